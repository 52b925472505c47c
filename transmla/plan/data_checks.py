"""What can be refused of a recipe's data, of `write` and of `evaluate.solve` before weights load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from transmla.data.loading import check_dataset
from transmla.errors import RecipeError
from transmla.generate.problems import check_problems, require
from transmla.plan.problem_overlap import check_heldout
from transmla.recipe.data_lists import Part, data_names
from transmla.recipe.schema import Recipe
from transmla.recipe.writing import Sampling, Solve, Text, Traces


def check_data(recipe: Recipe, positions: int) -> dict[str, str]:
    """Check every dataset that a recipe names, once for each list that names it, and the lengths of rows and windows.

    Args:
        positions: of the model.

    Returns:
        what the rows of each list are, by its key: `text`, `messages` or `completion`.

    Raises:
        RecipeError: the first that is missing, of another kind than the rest, or too long; an evaluation on what is
            written for.
    """
    online = not recipe.dry_run
    written = {f"@{entry.name}": _kind_of_written(entry) for entry in recipe.write}
    kinds = {key: _kind_of_list(data, key, written, online) for key, data in _lists(recipe)}
    for key, entries in (("write", recipe.write), ("evaluate.solve", recipe.evaluate.solve)):
        name, count = next(iter(Counter(entry.name for entry in entries).most_common(1)), ("", 0))
        if count > 1:
            raise RecipeError(key, f"two entries are called {name}; rename one")
    for index, entry in enumerate(recipe.write):
        key = f"write.{index}"
        if entry.engine == "vllm":
            require("vllm", "vllm", f"{key}.engine")
        if isinstance(entry, Text):
            kinds |= _check_prefixes(entry, key, recipe.write[:index], online)
            cue = max((len(cue.encode()) for cue in entry.cues), default=0)  # a token is a byte at least
            _check_length(entry, key, positions, max(1, entry.prefix_tokens) + cue)
        else:
            _check_problems(entry, key, positions, online)
    for index, solve in enumerate(recipe.evaluate.solve):
        _check_problems(solve, f"evaluate.solve.{index}", positions, online)
    check_heldout(recipe)
    for key, length in _lengths(recipe).items():
        if length > positions:
            raise RecipeError(key, f"{length} is above the {positions} positions of the model; lower it")
    return kinds


def _lists(recipe: Recipe) -> Iterator[tuple[str, Sequence[str | Part]]]:
    """The `data` lists of text, by key."""
    yield "convert.calibration.data", recipe.convert.calibration.data
    yield "evaluate.data", recipe.evaluate.data
    for index, stage in enumerate(recipe.recover):
        yield f"recover.{index}.data", stage.data


def _kind_of_written(entry: Traces | Text) -> str:
    return entry.format if isinstance(entry, Traces) else "text"


def _kind_of_list(data: Sequence[str | Part], key: str, written: dict[str, str], online: bool) -> str:
    """What the rows of a list are. written: kinds of what the recipe writes, by `@NAME`."""
    if not data:
        raise RecipeError(key, "no dataset is named; name at least one")
    kinds = {}
    for name in data_names(data):
        if not name.startswith("@"):
            kinds[name] = check_dataset(name, key, online=online)
        elif name not in written:
            known = ", ".join(other.removeprefix("@") for other in written)
            there = f"it writes: {known}" if known else "it writes nothing"
            raise RecipeError(key, f"{name} is no entry of the recipe's write ({there}); add one of this name")
        elif key == "evaluate.data":
            raise RecipeError(key, f"{name} is text of the teacher's own; evaluate on held-out text")
        else:
            kinds[name] = written[name]
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise RecipeError(key, f"datasets of different kinds cannot be joined: {listed}")
    return next(iter(kinds.values()))


def _check_prefixes(entry: Text, key: str, before: Sequence[Traces | Text], online: bool) -> dict[str, str]:
    """The kind of an entry's prefixes, by key; nothing where it has none. before: the entries that precede it."""
    if not entry.prefix_data:
        return {}
    key = f"{key}.prefix_data"
    earlier = {f"@{other.name}": "text" for other in before if _kind_of_written(other) == "text"}
    for name in entry.prefix_data:
        if name.startswith("@") and name not in earlier:
            raise RecipeError(key, f"{name} is no text of an entry before this one; put that first, or name other data")
    return {key: _kind_of_list(entry.prefix_data, key, earlier, online)}


def _check_problems(entry: Traces | Solve, key: str, positions: int, online: bool) -> None:
    check_problems(entry.problems, f"{key}.problems", skip=entry.skip, limit=entry.limit, online=online)
    _check_length(entry, key, positions, 1)


def _check_length(settings: Sampling, key: str, positions: int, prompt: int) -> None:
    if prompt + settings.max_new_tokens > positions:
        raise RecipeError(
            f"{key}.max_new_tokens",
            f"{settings.max_new_tokens} after a prompt is above the {positions} positions of the model; lower it",
        )


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
