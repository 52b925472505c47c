"""Artifacts: directories that appear whole or not at all, with a record of what made them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transmla import __version__
from transmla.recover.checkpoints import PARTIAL, fsync, fsync_tree

RECORD = "transmla.json"  # beside every artifact: fingerprint, seconds, tokens, peak memory, versions


def fingerprint(content: Any) -> str:
    """Digest of settings and inputs: equal content, equal digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished artifact, or None."""
    file = folder / RECORD
    return json.loads(file.read_text()) if file.is_file() else None


def read_records(root: Path) -> dict[str, dict[str, Any]]:
    """The records of all finished artifacts below a folder, by relative path."""
    return {str(file.parent.relative_to(root)): json.loads(file.read_text()) for file in sorted(root.rglob(RECORD))}


def is_current(folder: Path, digest: str) -> bool:
    """Whether a finished artifact was made from exactly these settings and inputs."""
    record = read_record(folder)
    return record is not None and record["fingerprint"] == digest


@contextmanager
def publishing(folder: Path, record: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary directory; on success write the record, sync, and rename it to `folder`.

    The caller may add to `record` until the block ends. On an exception nothing appears under the final name, and an
    earlier artifact stays.
    """
    scratch = folder.with_name(f"{PARTIAL}-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        (scratch / RECORD).write_text(json.dumps(record, indent=1))
        fsync_tree(scratch)
        old = folder.with_name(f"{PARTIAL}-old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(scratch, folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_whole(file: Path, content: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{PARTIAL}-{file.name}")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, file)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"transmla": __version__} | {name: version(name) for name in ("torch", "transformers", "trl")}
