"""What kind of source a recipe names, and what identifies it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transmla.recipe.model_source import ModelSource

FORMAT = 1  # raise it when a cached directory's content would change


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


def identity(section: ModelSource) -> dict[str, Any]:
    """What a source is, for fingerprints: its name, and its digest or its files' sizes and times."""
    kind = kind_of(section.source)
    found: dict[str, Any] = {"format": FORMAT}
    found |= section.model_dump(mode="json", exclude=set() if kind == "random" else {"config"})
    path = Path(section.source).expanduser()
    files = sorted(path.iterdir()) if kind == "directory" else [path] if kind == "gguf" else []
    found["files"] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return found
