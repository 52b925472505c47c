"""The other processes of a run, its launcher, and where a run leaves the signals to somebody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from transmla.process import siblings
from transmla.process.siblings import address, dead, death_of, descendants, pass_on, watch_others, watches
from transmla.process.watch import _launches, watched


@pytest.fixture
def other():
    """A process that trains beside this one."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    watch_others([address(), (address()[0], process.pid)])
    yield process
    watch_others([])
    process.kill()
    process.wait()


def test_a_dead_one_is_named_with_its_number(other: subprocess.Popen[bytes]) -> None:
    assert watches() and dead() is None
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead
    assert dead(60.0) is None and dead() == 1
    assert death_of(1).startswith(f"error: process 1 (pid {other.pid}) of 2 has ended")
    other.wait()
    assert dead() == 1


def test_what_cannot_be_read_is_no_death(other: subprocess.Popen[bytes], monkeypatch) -> None:
    def refuse(path: Path) -> bytes:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(siblings.Path, "read_bytes", refuse)
    assert dead() is None


def test_another_container_or_host_is_not_watched() -> None:
    """Its process ids mean others here."""
    host, pid = address()
    watch_others([(host, pid), (host.split()[0] + " pid:[1]", 999_999), ("elsewhere", 999_998)])
    assert not watches() and dead() is None
    watch_others([])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on(number: signal.Signals, other: subprocess.Popen[bytes]) -> None:
    """As SIGTERM where it was SIGINT: two of those would mean that nothing is to be saved."""
    assert other.pid in descendants()
    pass_on(number)
    assert other.wait(10) == -(signal.SIGTERM if number == signal.SIGINT else number)
    pass_on(number)


@pytest.mark.parametrize(
    ("word", "launches"),
    [
        ("/usr/bin/torchrun", True),
        ("accelerate", True),
        ("torch.distributed.run", True),
        ("accelerate.commands.launch", True),
        ("/lib/python3.11/site-packages/torch/distributed/launch.py", True),
        ("/home/accelerate/sweep.sh", False),
        ("/data/torchrun/recover.py", False),
        ("bash", False),
        ("", False),
    ],
)
def test_what_is_a_launcher(word: str, launches: bool) -> None:
    assert _launches(word) == launches


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]


def test_a_notebook_keeps_its_signals(monkeypatch) -> None:
    """An interrupt there stops the cell, not the process with all that it holds."""
    before = handlers()
    with watched():
        assert handlers() != before
    assert handlers() == before
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    with watched():
        assert handlers() == before


def test_beside_the_main_thread_nothing_is_watched() -> None:
    before, found = handlers(), []

    def run() -> None:
        with watched():
            found.append(handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
