"""Signal handlers, and a thread that ends the process where its main thread cannot.

A handler of Python runs when the main thread returns to Python. While that waits in a collective for another process,
or loads a file, the thread still sees

    a signal            outside of training: the main thread has GRACE seconds to end by itself
    no launcher         torchrun or accelerate was killed: as SIGTERM, but a training step has LAST_STEP seconds
    no other process    one that trained beside this one has died: end at once and name it
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
LAUNCHERS = ("torchrun", "accelerate", "torch.distributed", "deepspeed", "torch/distributed")
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Watch:
    """What is watched in a process of a run."""

    def __init__(self) -> None:
        self.launcher = _launcher()
        self.training = False
        self._gone: float | None = None  # since when the launcher is

    def look(self) -> None:
        """End the process, or ask it to end, where it must."""
        asked, now = request(), time.monotonic()
        if self.launcher is not None and os.getppid() != self.launcher and self._gone is None:
            self._gone = now
            asked.reason = asked.reason or "the end of its launcher"
            os.kill(os.getpid(), signal.SIGTERM)
        if self._gone is not None and now - self._gone > (LAST_STEP if self.training else GRACE):
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
    parent = os.getppid()
    with suppress(OSError):
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
        # The words before the program that is launched: its own may be in a folder called accelerate.
        own = [word for word in words[:4] if not word.endswith("recover.py")]
        if "TORCHELASTIC_RUN_ID" in os.environ or any(name in word for word in own for name in LAUNCHERS):
            return parent
    return None


_watch: Watch | None = None  # of the process, where it is watched
_follows = False


@contextmanager
def watched() -> Iterator[None]:
    """Within, signals stop the run in one line, and it ends with its launcher and with its other processes.

    What was ignored when the process started, as SIGHUP under nohup, stays ignored.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread() or _watch is not None:
        yield
        return
    asked = request()
    asked.number, asked.held, asked.reason, asked.dead = 0, 0, "", None
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
    _follow_forks()
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


def _follow_forks() -> None:
    """Workers (of data loaders) get no signals of this run's process group, and die with it."""
    global _follows
    if not _follows:
        _follows = True
        os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    if _watch is None:
        return
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is on_signal:
            signal.signal(number, signal.SIG_DFL)
    with suppress(OSError):
        os.setpgid(0, 0)
    die_with_parent()


def end_if_another_died() -> None:
    """For an error that may come of it: wait until it is seen."""
    if watches():
        until = time.monotonic() + DEAD + 4 * TICK
        while time.monotonic() < until:
            end_if_dead()
            time.sleep(TICK / 2)


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
