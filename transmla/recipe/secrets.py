"""Secrets do not belong in a recipe: it is saved beside every result, and parts of it are printed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from transmla.errors import RecipeError, masked

# Names of keys and of environment variables that hold a secret. `eos_token` and `tokens` are none.
KEY = re.compile(
    r"(?i)^((hf|hub|api|auth|access|bearer|github|git)_?)?token$"
    r"|password|passwd|secret|credential|(api|access|private)_?key"
)
VARIABLE = re.compile(r"(?i)(^|_)(token|secret|password|passwd|credentials?|(api|access|private)_?key)(_|$)")
FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([^},\s'\"]+)")
SHORTEST = 8  # letters of a secret; a shorter value stands in many words

ADVICE = "a recipe is saved with every result; leave it to the environment (HF_TOKEN, hf auth login)"


def check_secrets(tree: dict[str, Any]) -> None:
    """Refuse a recipe with a secret in it, without repeating that.

    Raises:
        RecipeError: a key is one of a secret, or a text holds credentials, a token, or the value of an environment
            variable that is called one.
    """
    for path, value in leaves(tree):
        key = ".".join(map(str, path))
        if value is not None and any(KEY.search(part) for part in path if isinstance(part, str)):
            raise RecipeError(key, f"this is the key of a secret; {ADVICE}")
        if not isinstance(value, str):
            continue
        if (found := secret_in(value)) is not None:
            raise RecipeError(key, f"{found} in it; {ADVICE}")


def secret_in(text: str) -> str | None:
    """What of a text looks like a secret, in words that end before "in it" and do not repeat it; None: nothing."""
    if masked(text) != text:
        return "credentials or a token stand"
    variable = held_in(text)
    return None if variable is None else f"the value of the environment variable {variable} stands"


def held_in(text: str) -> str | None:
    """The environment variable that is called like a secret and whose value stands in a text."""
    held = {name: value for name, value in os.environ.items() if VARIABLE.search(name) and len(value) >= SHORTEST}
    return next((name for name, secret in held.items() if secret in text), None)


def check_interpolations(tree: dict[str, Any]) -> None:
    """Refuse `${oc.env:NAME}` of a variable that is called like a secret. tree: with interpolations as they stand.

    Raises:
        RecipeError: there is one.
    """
    for path, value in leaves(tree):
        names = FROM_ENVIRONMENT.findall(value) if isinstance(value, str) else []
        name = next((name for name in names if VARIABLE.search(name)), None)
        if name is not None:
            raise RecipeError(".".join(map(str, path)), f"${{oc.env:{name}}} would put a secret into it; {ADVICE}")


def leaves(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Values of a plain tree with their places."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))
    else:
        yield path, tree
