"""Signal handlers, and a thread that ends the process where its main thread cannot.

A handler of Python runs when the main thread returns to Python. While that waits in a collective for another process,
or loads a file, the thread still sees

    a signal            outside of training: the main thread has GRACE seconds to end by itself
    no launcher         torchrun or accelerate was killed: as SIGTERM, but a training step has LAST_STEP seconds to end
    no other process    one that trained beside this one has died: end at once and name it
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from transmla.process.forks import follow_forks
from transmla.process.siblings import dead, death_of, rank, watch_others, watches
from transmla.process.stopping import (
    FAILED,
    SIGNALS,
    ask,
    end_now,
    end_stopped,
    held,
    on_repeated,
    on_signal,
    request,
)

GRACE = 3.0  # seconds
LAST_STEP = 20.0  # seconds
TICK = 0.5  # seconds between looks
DEAD = 1.0  # seconds after which a process that is gone counts as dead: it may just have ended as this one will
# Of a launcher's command line: a program's name, a module after -m, or a module's file.
PROGRAMS = ("torchrun", "accelerate", "accelerate-launch", "deepspeed")
MODULES = ("torch.distributed.", "accelerate.commands.", "deepspeed.launcher.")
FILES = tuple(f"/{module.replace('.', '/')}" for module in MODULES)
ORPHANED = "the end of its launcher"


class Watch:
    """What is watched in a process of a run."""

    def __init__(self) -> None:
        self.launcher = _launcher()
        self.training = False
        self._gone: float | None = None  # since when the launcher is

    def is_orphan(self) -> bool:
        """Whether the launcher is gone."""
        return self.launcher is not None and os.getppid() != self.launcher

    def look(self) -> None:
        """End the process, or ask it to end, where it must."""
        asked, now = request(), time.monotonic()
        if self._gone is None and self.is_orphan():
            self._gone = now
            if not asked.number:
                asked.reason = ORPHANED
            ask(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # wakes the main thread
        patience = LAST_STEP if self.training else GRACE
        if self._gone is not None and not asked.saving and now - self._gone > patience:
            end_now(128 + signal.SIGTERM, "" if rank() else "ended: its launcher is gone")
        if not asked.number or self.training:
            end_if_dead()
        if asked.number and (asked.dead is not None or (not self.training and now - asked.since > GRACE)):
            end_stopped()


def end_if_dead() -> None:
    """End this process where another one of the run has been dead for a while; the lowest that is left says so."""
    if (number := dead(DEAD)) is not None:
        end_now(FAILED, death_of(number))


def _launcher() -> int | None:
    """The process id of the launcher that started this process; None where a shell or a service did."""
    parent, elastic = os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ
    with suppress(OSError):
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
        if elastic or any(map(_launches, words[:4])):  # interpreter, its options, the program
            return 0 if elastic and _adopted(parent) else parent
    return None


def _launches(word: str) -> bool:
    return word.rpartition("/")[2] in PROGRAMS or word.startswith(MODULES) or any(part in word for part in FILES)


def _adopted(parent: int) -> bool:
    """Whether the launcher had died before one could look: it is Python, and what adopts orphans is not."""
    try:
        return "python" not in os.path.basename(os.readlink(f"/proc/{parent}/exe"))
    except OSError:
        return parent == 1


_watch: Watch | None = None  # of the process, where it is watched


@contextmanager
def watched() -> Iterator[None]:
    """Within, signals stop the run in one line, and it ends with its launcher and with its other processes.

    What was ignored when the process started, as SIGHUP under nohup, stays ignored. In an interactive session, as of a
    notebook, and in a thread beside the main one everything stays as it was: the process is more than this run.
    """
    global _watch
    interactive = hasattr(sys, "ps1") or sys.flags.interactive
    if interactive or threading.current_thread() is not threading.main_thread() or _watch is not None:
        yield
        return
    asked = request()
    asked.number, asked.held, asked.reason, asked.dead, asked.saving = 0, 0, "", None, False
    watch_others([])
    before = {number: signal.getsignal(number) for number in SIGNALS}
    receiver, sender = socket.socketpair()
    for end in (receiver, sender):
        end.setblocking(False)
    woken = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    _watch, done = Watch(), threading.Event()
    follow_forks(is_watched)
    thread = threading.Thread(target=_look_on, args=(_watch, receiver, done), name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _watch = None
        done.set()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(woken)
        with suppress(OSError):
            sender.send(b"\0")
        thread.join()
        receiver.close()
        sender.close()


def _look_on(watch: Watch, receiver: socket.socket, done: threading.Event) -> None:
    """The thread: looks when a signal wakes it, and every TICK."""
    while not done.is_set():
        if select.select([receiver], [], [], TICK)[0]:
            for number in receiver.recv(64):
                if number in SIGNALS:
                    on_repeated(number)
                    ask(number)  # the handler runs when the main thread can
        if not done.is_set():
            watch.look()


def is_watched() -> bool:
    """Whether this process is a run, or was forked from one."""
    return _watch is not None


def end_if_another_died() -> None:
    """For an error that may come of it: wait until it is seen."""
    if watches():
        until = time.monotonic() + DEAD + 4 * TICK
        while time.monotonic() < until:
            end_if_dead()
            time.sleep(TICK / 2)


def end_after_step(where: str) -> NoReturn:
    """End this process as it was asked to, or as another process of the run was, which may have seen more."""
    if _watch is not None and _watch.is_orphan():
        request().reason = ORPHANED
    end_stopped(where)


@contextmanager
def training() -> Iterator[None]:
    """Within, a signal is left to the training loop however long its step takes."""
    watch = Watch() if _watch is None else _watch
    with held():
        watch.training = True
        try:
            yield
        finally:
            request().since = time.monotonic()  # GRACE begins
            watch.training = False
