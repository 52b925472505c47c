"""Digests of local files, kept in the cache folder: a file that has not changed is not read again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from transmla.files import read_json, save_whole, sha256_of_all
from transmla.sources.kinds import cache_folder

Signature = tuple[int, ...]

SETTLED = 50_000_000  # nanoseconds: two changes within a tick of the file system's clock would have one signature

_seen: dict[tuple[Path, Signature], str] = {}  # what this process has read itself


def _signature(file: Path) -> Signature:
    """Changes with every change of a file's content: unlike its time, the time of its entry cannot be set."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def known_digests(files: Sequence[Path]) -> list[str]:
    """SHA-256 of files; those whose size, times and inode are what they were are not read again."""
    found = _read_before(files)
    for folder in {file.parent for file in files if file not in found}:
        kept = _kept(folder)
        for file in (file for file in files if file.parent == folder):
            *signature, digest = kept.get(file.name, [None])
            if tuple(signature) == _signature(file):
                found[file] = digest
    found |= _read([file for file in files if file not in found])
    return [found[file] for file in files]


def read_digests(files: Sequence[Path]) -> list[str]:
    """SHA-256 of files as they lie on the disk now; what this process has read before is not read again."""
    found = _read_before(files)
    found |= _read([file for file in files if file not in found])
    return [found[file] for file in files]


def keep_digests(digests: Mapping[Path, str]) -> None:
    """Remember the digests of files that were just written and read."""
    keep = {file: (_signature(file), digest) for file, digest in digests.items()}
    _seen.update({(file.absolute(), signature): digest for file, (signature, digest) in keep.items()})
    for folder in {file.parent for file in keep}:
        own = {file.name: entry for file, entry in keep.items() if file.parent == folder}
        _keep(folder, {name: [*signature, digest] for name, (signature, digest) in own.items()})


def _read_before(files: Sequence[Path]) -> dict[Path, str]:
    return {file: _seen[place] for file in files if (place := (file.absolute(), _signature(file))) in _seen}


def _read(files: Sequence[Path]) -> dict[Path, str]:
    before = {file: _signature(file) for file in files}
    found = dict(zip(files, sha256_of_all(files), strict=True))
    if files and all(_signature(file) == before[file] for file in files):
        keep_digests(found)
    return found


def _place(folder: Path) -> Path:
    return cache_folder() / "digests" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.json"


def _kept(folder: Path) -> dict[str, list]:
    kept = read_json(_place(folder))
    fine = isinstance(kept, dict) and kept.get("check") == _check(kept.get("files"))
    return kept["files"] if fine else {}


def _check(entries: object) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _keep(folder: Path, entries: dict[str, list]) -> None:
    settled = {name: entry for name, entry in entries.items() if time.time_ns() - entry[2] > SETTLED}
    if settled:
        with suppress(OSError):  # a cache that cannot be written costs time alone
            entries = _kept(folder) | settled
            save_whole(_place(folder), json.dumps({"files": entries, "check": _check(entries)}))
