"""What can be refused of a recipe's data, of `write` and of `evaluate.solve` before weights load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transmla.data.definition import find_definition, source_of
from transmla.data.inspection import LIMIT, check_dataset, inspect_files
from transmla.errors import RecipeError
from transmla.generate.problem_checks import check_problems, require
from transmla.plan.problem_overlap import check_heldout
from transmla.recipe.data_lists import Part, data_names
from transmla.recipe.schema import Recipe
from transmla.recipe.writing import Sampling, Solve, Text, Traces


def check_data(recipe: Recipe) -> dict[str, str]:
    """Check every dataset that a recipe names, once for each list that names it; no model is asked for.

    Returns:
        what the rows of each list are, by its key: `text`, `messages` or `completion`.

    Raises:
        RecipeError: the first that is missing, or of another kind than the rest; an evaluation on what is written for.
    """
    online = not recipe.dry_run
    written = {f"@{entry.name}": _kind_of_written(entry) for entry in recipe.write}
    kinds = {key: _kind_of_list(data, key, written, online) for key, data in data_lists(recipe)}
    for key, entries in (("write", recipe.write), ("evaluate.solve", recipe.evaluate.solve)):
        _check_names([entry.name for entry in entries], key)
    for index, entry in enumerate(recipe.write):
        key = f"write.{index}"
        if entry.engine == "vllm":
            require("vllm", "vllm", f"{key}.engine")
        if isinstance(entry, Text):
            kinds |= _check_prefixes(entry, key, recipe.write[:index], online)
        else:
            _check_problems(entry, key, online)
    for index, solve in enumerate(recipe.evaluate.solve):
        _check_problems(solve, f"evaluate.solve.{index}", online)
    check_heldout(recipe)
    return kinds


def check_lengths(recipe: Recipe, positions: int) -> None:
    """Check rows, windows and what is written against the positions of the model.

    Raises:
        RecipeError: the first that is too long.
    """
    for index, entry in enumerate(recipe.write):
        prompt = 1
        if isinstance(entry, Text):
            cue = max((len(cue.encode()) for cue in entry.cues), default=0)  # a token is a byte at least
            prompt = max(1, entry.prefix_tokens) + cue
        _check_length(entry, f"write.{index}", positions, prompt)
    for index, solve in enumerate(recipe.evaluate.solve):
        _check_length(solve, f"evaluate.solve.{index}", positions, 1)
    for key, length in _lengths(recipe).items():
        if length > positions:
            raise RecipeError(key, f"{length} is above the {positions} positions of the model; lower it")


def unseen_files(recipe: Recipe) -> list[str]:
    """A line for every local dataset that is too large to be looked at as a whole before it is loaded."""
    lines = []
    for key, data in data_lists(recipe):
        for name in data_names(data):
            if not name.startswith("@") and not inspect_files(*find_definition(name, key), key).whole:
                lines.append(
                    f"{key}: of {name} the first {LIMIT // 10**6} MB were looked at, the rest when it is loaded"
                )
    return lines


def _check_names(names: list[str], key: str) -> None:
    """Refuse names that cannot be folders beside one another. Some file systems do not tell capitals apart."""
    for index, name in enumerate(names):
        if name.lower() in [other.lower() for other in names[:index]]:
            raise RecipeError(key, f"two entries are called {name}; rename one")


def data_lists(recipe: Recipe) -> Iterator[tuple[str, Sequence[str | Part]]]:
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
    _check_named_once(data, key)
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise RecipeError(key, f"datasets of different kinds cannot be joined: {listed}")
    return next(iter(kinds.values()))


def _check_named_once(data: Sequence[str | Part], key: str) -> None:
    """Refuse the same rows twice in a list, under whatever name; parts with other filters are other rows."""
    seen: dict[tuple[Any, ...], str] = {}
    for entry, name in zip(data, data_names(data), strict=True):
        filters = () if isinstance(entry, str) else (entry.min_tokens, entry.max_tokens, entry.rows)
        if name.startswith("@"):
            rows: tuple[Any, ...] = (name,)
        else:
            definition, folder = find_definition(name, key)
            reading = definition.model_dump_json(exclude={"path", "local", "licence", "about"})
            rows = (*source_of(definition, folder, key), reading)
        mark = (rows, filters if any(filters) else ())
        if mark in seen:
            what = f"{name} is named" if seen[mark] == name else f"the rows of {name}, as {seen[mark]}, are named"
            raise RecipeError(key, f"{what} twice; leave one out (a mixture has weights, and repeat)")
        seen[mark] = name


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


def _check_problems(entry: Traces | Solve, key: str, online: bool) -> None:
    check_problems(entry.problems, f"{key}.problems", skip=entry.skip, limit=entry.limit, online=online)


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
