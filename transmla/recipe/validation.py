"""From a plain tree of values to a `Recipe`; a mistake is one line in the user's words."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from transmla.errors import RecipeError
from transmla.recipe.data_lists import Part
from transmla.recipe.keys import unknown_key
from transmla.recipe.schema import Recipe
from transmla.recipe.secrets import check_secrets
from transmla.recipe.stages import STAGES
from transmla.recipe.trainer_keys import TrainerKeyError
from transmla.recipe.writing import WRITINGS

# What a discriminator writes into an error's location.
TAGS: dict[str, Any] = STAGES | WRITINGS | {"part": Part, "dataset name": str}

# What a union writes there for its branches.
BRANCH = re.compile(r"(int|float|bool|str|constrained-\w+|ModelSource)$|(literal|function-\w+|list|nullable)\[")

LONGEST = 80  # letters of a wrong value in a message


def validate_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a plain tree of values.

    Raises:
        RecipeError: for the first wrong key, with its dotted name and what would be right; for a secret in it.
    """
    check_secrets(tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key, section = _dotted(first["loc"])
        if first["type"] == "extra_forbidden":
            raise unknown_key(key, section) from None
        if first["type"] == "missing":
            raise RecipeError(key, "required key is missing; add it to the recipe") from None
        if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
            kinds = WRITINGS if key.startswith("write") else STAGES
            raise RecipeError(f"{key}.kind", f"unknown kind of stage; use one of: {', '.join(kinds)}") from None
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, TrainerKeyError):
            raise RecipeError(f"{key}.{cause.key}", str(cause)) from None
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f", got {_short(first['input'])}"
        raise RecipeError(key, message + got) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _dotted(location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The dotted key of a pydantic location and the known keys of its section."""
    parts: list[str] = []
    model: Any = Recipe
    for index, part in enumerate(location):
        if parts and parts[-1].isdigit() and part in TAGS:  # the discriminator's tag is no key
            model = TAGS[str(part)]
            continue
        if BRANCH.match(str(part)):
            continue
        if index + 1 < len(location) and isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            model = field.annotation if field is not None else None
        parts.append(str(part))
    known = list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
    return ".".join(parts), known
