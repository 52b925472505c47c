"""Files that a reader sees whole or not at all, and the manifest by which one tells later that they still are."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
MANIFEST = "manifest.json"  # in a finished folder: bytes and SHA-256 of every other file
_scratch: set[Path] = set()  # folders that this process fills


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


def read_json(file: Path) -> Any:
    """The content of a JSON file; None where there is none or it cannot be read."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):  # missing, no file; cut off, not UTF-8
        return None


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file in place. change: is given the content."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a folder with what is in it, or a link and not what it leads to; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder, removed in the end unless it was renamed.

    While this process lives it holds a lock on the folder, so that `remove_abandoned` can tell a killed run's.
    """
    remove(folder)
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY)
    _scratch.add(folder)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        os.close(descriptor)
        remove(folder)
        _scratch.discard(folder)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder among the system's temporary ones, removed in the end."""
    with tempfile.TemporaryDirectory() as name:
        _scratch.add(Path(name))
        try:
            yield Path(name)
        finally:
            _scratch.discard(Path(name))


def remove_scratch() -> None:
    """Remove the scratch and temporary folders of this process, which is about to end without cleaning up."""
    for folder in list(_scratch):
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders directly below `parent` whose process is gone."""
    for folder in parent.glob(f"{PARTIAL}*"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody works in it, or the file system cannot say
            continue
        finally:
            os.close(descriptor)
        remove(folder)


def sha256_of(file: Path) -> str:
    """Digest of a file's content, which is read as a stream."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sha256_of_all(files: Sequence[Path]) -> list[str]:
    """Digests of files; large ones are read beside one another."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_of, files))


def save_manifest(folder: Path) -> dict[str, str]:
    """Write the manifest of a folder that is otherwise finished; returns the digests by relative name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    found = dict(zip([str(file.relative_to(folder)) for file in files], sha256_of_all(files), strict=True))
    listed = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in found.items()}
    save_whole(folder / MANIFEST, json.dumps(listed, indent=1))
    return found


def listed_files(folder: Path) -> dict[str, dict[str, Any]] | None:
    """A folder's manifest: bytes and SHA-256 by relative name; None where it has none that can be read."""
    listed = read_json(folder / MANIFEST)
    fine = isinstance(listed, dict) and all(
        isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in listed.values()
    )
    return listed if fine else None


def damage(folder: Path, digests: Callable[[Sequence[Path]], Sequence[str]] = sha256_of_all) -> str | None:
    """What of a finished folder is not as its manifest says, in words; None: all is there and as it was written.

    Files that the manifest does not name do not matter.

    Args:
        digests: of files, in order; asked only when all of them are there and of the right size.
    """
    listed = listed_files(folder)
    if listed is None:
        return f"{MANIFEST} is missing or cannot be read"
    for name, entry in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
    found = digests([folder / name for name in listed])
    for (name, entry), digest in zip(listed.items(), found, strict=True):
        if digest != entry["sha256"]:
            return f"{name} has another content than was written"
    return None
