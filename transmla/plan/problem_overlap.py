"""Problems that are evaluated on are never written for: which parts of problem sets meet, without loading any."""

from __future__ import annotations

from typing import Any

from transmla.data.definition import find_definition, source_of
from transmla.errors import RecipeError
from transmla.recipe.schema import Recipe
from transmla.recipe.writing import Problems, Solve, Traces


def check_heldout(recipe: Recipe) -> None:
    """Refuse a recipe that writes for a problem which it evaluates on.

    Raises:
        RecipeError: two parts of the same problem set overlap, with the rows to use instead.
    """
    for index, entry in enumerate(recipe.write):
        if not isinstance(entry, Traces):
            continue
        for number, solve in enumerate(recipe.evaluate.solve):
            reason = overlap(entry, solve)
            if reason:
                raise RecipeError(
                    f"evaluate.solve.{number}.problems",
                    f"{reason}, for which write.{index} ({entry.name}) writes; give one of them other rows by "
                    f"skip and limit",
                )


def overlap(one: Traces | Solve, other: Traces | Solve) -> str | None:
    """Which problems two parts have in common, as words; None: none that can be known without loading them."""
    if one.problems.generator is not None:
        return _same_generator(one, other)
    if other.problems.data is None or _source(one.problems) != _source(other.problems):
        return None
    cuts = {find_definition(str(part.problems.data), "problems")[0].cut for part in (one, other)}
    if cuts == {"train", "test"}:
        return None
    if len(cuts) > 1:
        return f"{other.problems.data} is part of {one.problems.data} or the reverse"
    rows = _common(_rows(one, 0), _rows(other, 0))
    return rows and f"{rows} of {other.problems.data} are among the problems"


def _same_generator(one: Traces | Solve, other: Traces | Solve) -> str | None:
    """reasoning-gym makes problem i of a set from seed + i, so that sets of neighbouring seeds share problems."""
    if one.problems.generator != other.problems.generator:
        return None
    starts = one.problems.seed, other.problems.seed
    rows = _common(_rows(one, starts[0]), _rows(other, starts[1]))
    return rows and f"{rows} (seed + row) of {other.problems.generator} are among the problems"


def _rows(part: Traces | Solve, start: int) -> tuple[int, float]:
    """First and one after the last row; the end of a dataset is not known before it is loaded."""
    end = part.problems.size if part.problems.generator is not None else float("inf")
    if part.limit is not None:
        end = min(end, part.skip + part.limit)
    return start + part.skip, start + end


def _common(one: tuple[int, float], other: tuple[int, float]) -> str | None:
    first, end = max(one[0], other[0]), min(one[1], other[1])
    if first >= end:
        return None
    return f"rows from {first} on" if end == float("inf") else f"rows {first} to {int(end) - 1}"


def _source(section: Problems) -> tuple[Any, ...]:
    """What rows a definition counts, whatever its file is called, and before it is cut."""
    return source_of(*find_definition(str(section.data), "problems"), "problems")
