"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"


def fsync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Force every file below a folder, and the folder, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def save_whole(file: Path, content: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{PARTIAL}-{file.name}")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, file)
