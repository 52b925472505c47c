"""The other processes of a run on this host: whether they live, and what is said when one does not."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

_pids: dict[int, int] = {}  # by number, of the processes that are watched
_missing: dict[int, float] = {}  # since when, by number


def rank() -> int:
    """This process's number among those of the run, as launchers tell it."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


def watch_others(processes: Sequence[tuple[str, int]]) -> None:
    """Name the processes of the run; an empty list ends the watch.

    Args:
        processes: host and process id, by number.
    """
    here = socket.gethostname()
    _missing.clear()
    _pids.clear()
    _pids.update({number: pid for number, (host, pid) in enumerate(processes) if host == here and pid != os.getpid()})


def watches() -> bool:
    """Whether there are others."""
    return bool(_pids)


def dead(seconds: float = 0.0) -> int | None:
    """The lowest number of a process that is dead, and was found so this long ago."""
    now = time.monotonic()
    for number, pid in list(_pids.items()):
        if not _alive(pid):
            _missing.setdefault(number, now)
    return min((number for number, since in _missing.items() if now - since >= seconds), default=None)


def death_of(number: int) -> str:
    """One sentence about a dead process; nothing where it is another one's to say."""
    if rank() != min([rank(), *(other for other, pid in _pids.items() if _alive(pid))]):
        return ""
    who = f"process {number} (pid {_pids.get(number)}) of {len(_pids) + 1}"
    return (
        f"error: {who} has ended, and the run with it; if it has printed no reason, the system killed it, most often "
        "for want of memory; the same command goes on from the last checkpoint"
    )


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
