"""What can be refused of a recipe's data, of `write` and of `evaluate.solve` before weights load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transmla.data.definition import find_definition
from transmla.data.loading import check_dataset
from transmla.errors import RecipeError
from transmla.generate.problems import check_problems, require
from transmla.plan.problem_overlap import check_heldout
from transmla.recipe.data_lists import Part, data_names
from transmla.recipe.schema import Recipe
from transmla.recipe.writing import Sampling, Traces


def check_written(recipe: Recipe, positions: int) -> None:
    """Check everything that lets models write. positions: of the model.

    Raises:
        RecipeError: the first thing that would fail later, or an evaluation on what was written for.
    """
    online = not recipe.dry_run
    for key, entries in (("write", recipe.write), ("evaluate.solve", recipe.evaluate.solve)):
        name, count = next(iter(Counter(entry.name for entry in entries).most_common(1)), ("", 0))
        if count > 1:
            raise RecipeError(key, f"two entries are called {name}; rename one")
    for index, entry in enumerate(recipe.write):
        key = f"write.{index}"
        if entry.engine == "vllm":
            require("vllm", "vllm", f"{key}.engine")
        if isinstance(entry, Traces):
            check_problems(entry.problems, f"{key}.problems", skip=entry.skip, limit=entry.limit, online=online)
            _check_length(entry, key, positions, 1)
            continue
        earlier = {
            f"@{before.name}"
            for before in recipe.write[:index]
            if not isinstance(before, Traces) or before.format == "text"
        }
        for name in entry.prefix_data:
            if not name.startswith("@"):
                check_dataset(name, f"{key}.prefix_data", online=online)
            elif name not in earlier:
                raise RecipeError(
                    f"{key}.prefix_data",
                    f"{name} is no text of an entry before this one; put that first, or name other data",
                )
        if entry.prefix_data:
            kind_of_data(entry.prefix_data, f"{key}.prefix_data", recipe)
        cue = max((len(cue.encode()) for cue in entry.cues), default=0)  # a token is a byte at least
        _check_length(entry, key, positions, max(1, entry.prefix_tokens) + cue)
    for index, solve in enumerate(recipe.evaluate.solve):
        key = f"evaluate.solve.{index}"
        check_problems(solve.problems, f"{key}.problems", skip=solve.skip, limit=solve.limit, online=online)
        _check_length(solve, key, positions, 1)
    check_heldout(recipe)


def kind_of_data(data: Sequence[str | Part], key: str, recipe: Recipe) -> str:
    """What the rows of a `data` list are: `text`, `messages` or `completion`.

    Raises:
        RecipeError: of several kinds, which cannot be joined.
    """
    written = {entry.name: entry.format if isinstance(entry, Traces) else "text" for entry in recipe.write}
    kinds = {}
    for name in data_names(data):
        if name.startswith("@"):
            kinds[name] = written[name.removeprefix("@")]
            continue
        definition, _ = find_definition(name, key)
        if definition.messages or "messages" in definition.columns:
            kinds[name] = "messages"
        else:
            kinds[name] = "completion" if definition.template is None and "prompt" in definition.columns else "text"
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise RecipeError(key, f"datasets of different kinds cannot be joined: {listed}")
    return next(iter(kinds.values()))


def check_written_name(name: str, key: str, recipe: Recipe) -> None:
    """Check that `@NAME` means an entry of `write`.

    Raises:
        RecipeError: it means none, or the list is of text to evaluate on.
    """
    known = [entry.name for entry in recipe.write]
    if name.removeprefix("@") not in known:
        there = f"it writes: {', '.join(known)}" if known else "it writes nothing"
        raise RecipeError(key, f"{name} is no entry of the recipe's write ({there}); add one of this name")
    if key == "evaluate.data":
        raise RecipeError(key, f"{name} is text of the teacher's own; evaluate on held-out text")


def _check_length(settings: Sampling, key: str, positions: int, prompt: int) -> None:
    if prompt + settings.max_new_tokens > positions:
        raise RecipeError(
            f"{key}.max_new_tokens",
            f"{settings.max_new_tokens} after a prompt is above the {positions} positions of the model; lower it",
        )


def check_data(recipe: Recipe, positions: int) -> None:
    """Check every dataset that a recipe names, and the lengths of its rows and windows.

    Args:
        positions: of the model.

    Raises:
        RecipeError: the first that is missing, of another kind than the rest, or too long.
    """
    used = [("convert.calibration.data", recipe.convert.calibration.data), ("evaluate.data", recipe.evaluate.data)]
    used += [(f"recover.{index}.data", stage.data) for index, stage in enumerate(recipe.recover)]
    for key, names in used:
        if not names:
            raise RecipeError(key, "no dataset is named; name at least one")
        for name in data_names(names):
            if name.startswith("@"):
                check_written_name(name, key, recipe)
            else:
                check_dataset(name, key, online=not recipe.dry_run)
        kind_of_data(names, key, recipe)
    check_written(recipe, positions)
    for key, length in _lengths(recipe).items():
        if length > positions:
            raise RecipeError(key, f"{length} is above the {positions} positions of the model; lower it")


def _lengths(recipe: Recipe) -> dict[str, int]:
    """Tokens of a window or row, by the key that says so."""
    found = {
        "convert.calibration.max_length": recipe.convert.calibration.max_length,
        "evaluate.max_length": recipe.evaluate.max_length,
    }
    for index, stage in enumerate(recipe.recover):
        found[f"recover.{index}.trainer.max_length"] = stage.trainer.get("max_length") or 0
    for index, stage in enumerate(recipe.recover):
        if stage.kind == "on_policy":
            longest = stage.prompt_tokens + stage.max_new_tokens
            found[f"recover.{index}.prompt_tokens + max_new_tokens"] = longest
    return found
