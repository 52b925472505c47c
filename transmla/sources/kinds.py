"""What kind of source a recipe names, and where models are cached."""

from __future__ import annotations

import os
from pathlib import Path

from transmla.errors import RecipeError

FORMAT = 1  # raise it when a cached directory's content would change
DRAWS = 2  # the same of random weights
TOKENIZERS = 2  # the same of what is made of a GGUF's tokenizer


def cache_folder() -> Path:
    """Where dequantised models are kept."""
    return Path(os.environ.get("TRANSMLA_CACHE") or Path.home() / ".cache" / "transmla")


def kind_of(source: str) -> str:
    """`random`, `pypi`, `gguf`, `directory` or `hub`."""
    if source == "random":
        return "random"
    if source.startswith("pypi:"):
        return "pypi"
    if source.endswith(".gguf"):
        return "gguf"
    return "directory" if Path(source).is_dir() or source.startswith((".", "/", "~")) else "hub"


def revisions_of(kind: str) -> dict[str, int]:
    """What changes with this package in what is made of a source: for fingerprints, and for names in the cache."""
    found = {"format": FORMAT}
    if kind == "random":
        found["draws"] = DRAWS
    if kind in ("pypi", "gguf"):
        found["tokenizers"] = TOKENIZERS
    return found


def check_there(source: str, key: str) -> None:
    """Check that a directory or a GGUF is there. key: of the section, for errors.

    Raises:
        RecipeError: it is not, or may not be read.
    """
    kind, path = kind_of(source), Path(source).expanduser()
    if kind == "directory" and not path.is_dir():
        raise RecipeError(f"{key}.source", f"no such directory: {source}; correct the path")
    if kind == "directory" and not os.access(path, os.R_OK | os.X_OK):
        raise RecipeError(f"{key}.source", f"you may not read {source}; change its permissions")
    if kind == "gguf" and not path.is_file():
        raise RecipeError(f"{key}.source", f"no such file: {source}; correct the path")
