"""Where a run writes: a folder that can be made, and that leads nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from transmla.errors import RecipeError
from transmla.recipe.schema import Recipe

# What a run makes below its output directory.
OWN = (
    "answers.jsonl",
    "checkpoints",
    "converted",
    "evaluation",
    "exported",
    "figures",
    "logs",
    "recorded",
    "recovered",
    "report.json",
    "report.md",
    "stages",
    "written",
)


def output_folder(recipe: Recipe) -> Path:
    """The output directory of a recipe, `~` expanded.

    Raises:
        RecipeError: the home of a user who is not there.
    """
    folder = recipe.output_dir.replace("{name}", recipe.name)
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise RecipeError("output_dir", f"{folder}: there is no such user; name another folder") from None


def check_output_folder(folder: Path) -> None:
    """Check that artifacts can be written below a folder, and there alone.

    Raises:
        RecipeError: a file is in the way, a link leads to nothing, nothing may be written, or a link inside leads out.
    """
    try:
        if folder.is_symlink() and not folder.exists():
            raise RecipeError("output_dir", f"{folder} is a link to nothing; make its target, or remove it")
        if folder.exists() and not folder.is_dir():
            raise RecipeError("output_dir", f"{folder} is a file; name a folder")
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise RecipeError("output_dir", f"{existing} is a file, nothing can be below it; name another folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RecipeError("output_dir", f"nothing may be written below {existing}; name another folder")
        root = folder.resolve()
        leading_out = next((link for link in _links(folder) if not link.resolve().is_relative_to(root)), None)
    except OSError as error:  # a name that is too long, a loop of links
        raise RecipeError("output_dir", f"{folder} cannot be used: {error.strerror}; name another folder") from None
    if leading_out is not None:
        raise RecipeError(
            "output_dir",
            f"{leading_out} is a link to {leading_out.resolve()}, and nothing is written outside the output directory; "
            "remove the link",
        )


def _links(folder: Path) -> Iterator[Path]:
    """Symbolic links among what a run writes."""
    for name in OWN:
        path = folder / name
        if path.is_symlink():
            yield path
            continue
        for place, folders, files in os.walk(path):
            yield from (entry for part in (*folders, *files) if (entry := Path(place) / part).is_symlink())
