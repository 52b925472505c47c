"""One run at a time below an output directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transmla.errors import RecipeError
from transmla.files import read_json
from transmla.process.siblings import rank

LOCK = ".lock"  # what counts is the kernel's lock on it, not that it is there


@contextmanager
def only_run(folder: Path, *, beside: bool = False) -> Iterator[None]:
    """Keep other runs out of an output directory. The kernel lets go when the process ends, in whichever way.

    The first of several processes holds it for all: the others write only beside it.

    Args:
        beside: the folder is itself what is made, and replaced as a whole; its lock lies next to it.

    Raises:
        RecipeError: another run holds it.
    """
    if rank() != 0:
        yield
        return
    place = folder.with_name(f"{LOCK}-{folder.name}") if beside else folder / LOCK
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = _open(place, folder)
    except OSError as error:
        raise RecipeError("output_dir", f"{folder} cannot be used: {error.strerror}; name another folder") from None
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked child would keep it
        os.close(file)


def _open(place: Path, folder: Path) -> int:
    """The descriptor of the locked file."""
    while True:
        file = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(file)
                raise RecipeError("output_dir", _in_use(place, folder)) from None
            return file  # a file system without locks
        with suppress(FileNotFoundError):
            if os.fstat(file).st_ino == place.stat().st_ino:  # not one that its holder has just removed
                break
        os.close(file)
    os.ftruncate(file, 0)
    told = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.write(file, json.dumps(told).encode())
    return file


def _in_use(place: Path, folder: Path) -> str:
    held = read_json(place)
    who = f"process {held.get('pid')} on {held.get('host')}" if isinstance(held, dict) else "another process"
    return f"{folder} is in use by a run, {who}; wait for its end, or name another folder"
