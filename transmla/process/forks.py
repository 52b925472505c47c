"""Processes that are forked from a run, as the workers of data loaders: they end with it, and by it alone."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

from transmla.process.stopping import SIGNALS

PR_SET_PDEATHSIG = 1
_follows = False
_forking = (0, False)  # who forks: its process id, and whether in its main thread


def end_with_parent() -> None:
    """From now on this process is killed when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def follow_forks(wanted: Callable[[], bool]) -> None:
    """From now on, what is forked while `wanted` says so ends with this process, and heeds nobody else.

    A terminal, systemd and Slurm send their signals to all processes. A worker that ended of one would break the
    training step at whose end its run saves a checkpoint.
    """
    global _follows
    if not _follows:
        _follows = True
        os.register_at_fork(before=_before, after_in_child=lambda: _in_child() if wanted() else None)


def _before() -> None:
    global _forking
    _forking = (os.getpid(), threading.current_thread() is threading.main_thread())


def _in_child() -> None:
    parent, by_main_thread = _forking
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if by_main_thread:  # the end of another thread is not the end of the run
        with suppress(OSError, AttributeError):
            end_with_parent()
        if os.getppid() != parent:  # it had ended before the kernel knew
            os._exit(1)
    threading.Thread(target=_heed, args=(parent,), name="heed", daemon=True).start()


def _heed(parent: int) -> None:
    """End when the parent says so, as it does to workers that it needs no more."""
    while True:
        if signal.sigwaitinfo(SIGNALS).si_pid == parent:
            os._exit(0)
