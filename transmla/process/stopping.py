"""What asks a run to stop: a signal ends it at once, or at the end of the training step that it falls into.

The exit code is 128 + the signal's number, as shells count. The process ends where it stands and cleans up first; an
exception would not do, because Python drops those that are raised in finalizers and callbacks.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from transmla.files import remove_scratch
from transmla.process.siblings import dead, death_of, descendants, pass_on, rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
REPEATED = 1.0  # seconds; `timeout` and some launchers send one request twice
FAILED = 2  # exit code of what a user has to mend
CLEANING = 10.0  # seconds that an ending process may take for what it has half made


@dataclass
class Request:
    """Whether this process is asked to stop.

    number: the signal's, 0 for none. since: its time. held: how many blocks have it wait. reason: another one than the
    signal. dead: the number of a process of the run that had died before, for which a launcher stops the others.
    saving: the last step is done, and its checkpoint is waited for.
    """

    number: int = 0
    since: float = 0.0
    held: int = 0
    reason: str = ""
    dead: int | None = None
    saving: bool = False


_request = Request()  # of the process, as its signal handlers are
_ending = threading.RLock()  # another signal may come while it is held


def request() -> Request:
    """Of this process."""
    return _request


def ask(number: int) -> None:
    """Ask this process to stop, as a signal does that comes while it is held."""
    if not _request.number:
        _request.since, _request.number = time.monotonic(), number
        _request.dead = dead()


def on_signal(number: int, frame: object) -> None:
    """The handler: ends the process unless something holds it."""
    ask(number)
    if not _request.held:
        end_stopped()


def on_repeated(number: int) -> None:
    """A second Ctrl-C ends the process whatever it does."""
    if number == signal.SIGINT and _request.number and time.monotonic() - _request.since > REPEATED:
        say("" if rank() else "ended by a second SIGINT; the same command goes on from the last checkpoint")
        os._exit(128 + number)


@contextmanager
def held() -> Iterator[None]:
    """Within, a signal waits: for the end of a training step, or of two renames that belong together."""
    _request.held += 1
    try:
        yield
    finally:
        _request.held -= 1
    if _request.number and not _request.held:
        end_stopped()


def end_stopped(where: str = "") -> NoReturn:
    """End this process as it was asked to; the first of the run says so. where: how far it has come."""
    if _request.dead is not None:
        end_now(FAILED, death_of(_request.dead))
    pass_on(_request.number)
    why = _request.reason or signal.Signals(_request.number).name
    end_now(128 + _request.number, "" if rank() else f"stopped by {why}{where}; the same command goes on")


def end_now(code: int, sentence: str) -> NoReturn:
    """End this process from any thread, whatever the others do: its children, what it has half made, itself.

    Nothing is imported here: a handler may have interrupted an import.
    """
    _ending.acquire()  # the first thread that comes here ends the process
    with suppress(RuntimeError, MemoryError):
        # Not threading's: its start takes a lock that the interrupted thread may hold.
        _thread.start_new_thread(_end_at_last, (code,))
    for pid in descendants():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    say(sentence)
    remove_scratch()
    os._exit(code)


def _end_at_last(code: int) -> None:
    """Where a full pipe that nobody reads, or a slow disk, keeps a process from ending."""
    time.sleep(CLEANING)
    os._exit(code)


def say(sentence: str) -> None:
    """One line on stderr, past Python's buffers: a handler may have interrupted somebody who writes to them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    if sentence:
        with suppress(OSError):
            os.write(2, f"{sentence}\n".encode())
