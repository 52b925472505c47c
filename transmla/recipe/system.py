"""The one operating system that the program runs on."""

from __future__ import annotations

import sys

from transmla.errors import RecipeError


def require_linux() -> None:
    """Refuse another system before anything that it lacks is imported.

    Raises:
        RecipeError: this is not Linux.
    """
    if sys.platform != "linux":
        raise RecipeError(
            "system", f"this program runs on Linux alone, and this is {sys.platform}; use a Linux machine"
        )
