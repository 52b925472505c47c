"""Values that stand as an interpolation: `${seed}`, `${oc.env:DATA}/text.jsonl`. They are saved as they stand."""

from __future__ import annotations

import re
from typing import Any

from transmla.errors import RecipeError
from transmla.recipe.schema import Recipe
from transmla.recipe.secrets import leaves

MARK = "${"
REFERENCE = re.compile(r"\$\{(?!\s*oc\.env\s*:)")  # to another value, which may hold references itself
MOST = 20  # references of a recipe: each may double what the one before stands for


def interpolations(tree: dict[str, Any]) -> dict[tuple[str | int, ...], str]:
    """The values of a tree that stand as interpolations, by their place.

    Raises:
        RecipeError: there are more references than any recipe needs.
    """
    found = {path: value for path, value in leaves(tree) if isinstance(value, str) and MARK in value}
    if sum(len(REFERENCE.findall(value)) for value in found.values()) > MOST:
        raise RecipeError("recipe", f"more than {MOST} values refer to others by ${{...}}; write some of them out")
    return found


def as_written(recipe: Recipe) -> dict[str, Any]:
    """A recipe with all defaults as a plain tree, interpolations as they stood: what they stand for may be a secret of
    this machine, and another machine has its own."""
    tree = recipe.model_dump(mode="json", exclude={"dry_run"})
    for path, text in recipe._interpolations.items():
        if path[0] != "dry_run":
            _put(tree, path, text)
    return tree


def _put(tree: Any, path: tuple[str | int, ...], text: str) -> None:
    *parents, leaf = path
    for part in parents:
        tree = tree[part]
    tree[leaf] = text
