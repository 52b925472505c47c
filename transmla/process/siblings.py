"""The other processes of a run on this host: whether they live, and what is said when one does not."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_pids: dict[int, int] = {}  # by number, of the processes that are watched
_missing: dict[int, float] = {}  # since when, by number
_count = 1  # of the run's processes, on all hosts


def rank() -> int:
    """This process's number among those of the run, as launchers tell it."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


def address() -> tuple[str, int]:
    """Where this process is found: its host, and the process id there. Containers of one host count as several."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}", os.getpid()


def watch_others(processes: Sequence[tuple[str, int]]) -> None:
    """Name the processes of the run; an empty list ends the watch.

    Args:
        processes: the address of each, by number.
    """
    global _count
    here, own = address()
    _missing.clear()
    _pids.clear()
    _pids.update({number: pid for number, (host, pid) in enumerate(processes) if host == here and pid != own})
    _count = len(processes)


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
    who = f"process {number} (pid {_pids.get(number)}) of {_count}"
    return (
        f"error: {who} has ended, and the run with it; if it has printed no reason, the system killed it, most often "
        "for want of memory; the same command goes on from the last checkpoint"
    )


def pass_on(number: int) -> None:
    """Send the others a signal that may have come to this process alone, before it ends of it."""
    number = signal.SIGTERM if number == signal.SIGINT else number  # their second SIGINT would mean more
    living = [pid for pid in _pids.values() if _alive(pid)]
    for pid in living:
        with suppress(OSError):
            os.kill(pid, number)
    if living:
        time.sleep(0.2)  # while they look whether somebody had died before


def descendants() -> list[int]:
    """Process ids of this process's children, their children, and so on."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (fields := _stat(int(entry))):
            parents[int(entry)] = int(fields[1])
    found = [os.getpid()]
    for above in found:  # grows meanwhile
        found += [pid for pid, parent in parents.items() if parent == above]
    return found[1:]


def _stat(pid: int) -> list[bytes] | None:
    """What the kernel tells of a process from its state on; None where there is none, empty where it does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:  # as for want of file descriptors
        return []


def _alive(pid: int) -> bool:
    fields = _stat(pid)
    return fields is not None and (not fields or fields[0] not in (b"Z", b"X"))
