"""What a model source is, for fingerprints: what its files hold, not where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transmla.recipe.model_source import ModelSource
from transmla.sources.file_digests import known_digests
from transmla.sources.hub_commits import commit_of
from transmla.sources.kinds import kind_of, revisions_of

# What loading reads of a model directory; a README may change.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.bin")


def identity(section: ModelSource) -> dict[str, Any]:
    """A hub id with its commit, or a requirement with what pins it; of local files the digests."""
    kind = kind_of(section.source)
    local = kind in ("directory", "gguf")
    left_out = ({"source"} if local else set()) | (set() if kind == "random" else {"config"})
    found: dict[str, Any] = {"kind": kind, **section.model_dump(mode="json", exclude=left_out), **revisions_of(kind)}
    if kind == "hub":
        found["commit"] = commit_of(section.source, section.revision, "model")
    path = Path(section.source).expanduser()
    files = [path] if kind == "gguf" else []
    if kind == "directory":
        files = sorted(file for pattern in PATTERNS for file in path.glob(pattern) if file.is_file())
    names = [file.name for file in files] if kind == "directory" else ["gguf" for _ in files]
    found["files"] = list(zip(names, known_digests(files), strict=True))
    return found
