"""Two processes of a run: they stop after the same step, and end with their launcher and with one another."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.faults.attempts import TORCHRUN
from tests.faults.recipe import contents
from tests.recipes.test_signals import start, wait_for
from tests.unit.test_stopping import gone

pytestmark = pytest.mark.faults


def ranks(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of a launcher's children that train."""
    done = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in done.stdout.splitlines() if "recover.py" in line]


def finish(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=300)[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("straight")
    process = start(folder, *TORCHRUN)
    printed = finish(process)
    assert process.returncode == 0, printed[-3000:]
    return contents(folder / "out")


@pytest.mark.parametrize("who", ["launcher", "first", "second"])
def test_a_signal_to_any_of_them(who: str, straight: dict[str, str], tmp_path) -> None:
    process = start(tmp_path, *TORCHRUN)
    wait_for(process, "{'loss'")
    first, second = ranks(process)
    os.kill({"launcher": process.pid, "first": first, "second": second}[who], signal.SIGTERM)
    printed = finish(process)
    said = [line for line in printed.splitlines() if line.startswith(("stopped", "error"))]
    assert len(said) == 1 and said[0].startswith("stopped by SIGTERM after step "), printed
    assert len(list((tmp_path / "out" / "checkpoints" / "0_layerwise").glob("checkpoint-*"))) == 1
    process = start(tmp_path, *TORCHRUN)
    finish(process)
    assert process.returncode == 0 and contents(tmp_path / "out") == straight


@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_to_one_of_them_outside_of_training(number: int, tmp_path) -> None:
    process = start(tmp_path, *TORCHRUN)
    wait_for(process, "[convert] ...")
    os.kill(ranks(process)[number], signal.SIGUSR1)
    printed = finish(process)
    said = [line for line in printed.splitlines() if line.startswith(("stopped", "error"))]
    assert said == ["stopped by SIGUSR1; the same command goes on"], printed


def test_a_second_run_of_two_processes_is_refused(tmp_path) -> None:
    first = start(tmp_path, *TORCHRUN)
    wait_for(first, "[convert] ...")
    holder = ranks(first)[0]
    os.kill(holder, signal.SIGSTOP)
    second = start(tmp_path, *TORCHRUN)
    printed = finish(second)
    os.kill(holder, signal.SIGCONT)
    said = [line for line in printed.splitlines() if line.startswith(("stopped", "error"))]
    assert second.returncode == 1 and len(said) == 1
    assert said[0].startswith(f"error: output_dir: out is in use by a run, process {holder} on ")
    finish(first)
    assert first.returncode == 0


def test_the_launcher_is_killed(straight: dict[str, str], tmp_path) -> None:
    process = start(tmp_path, *TORCHRUN)
    wait_for(process, "{'loss'")
    left = ranks(process)
    process.kill()
    assert all(gone(pid, 10.0) for pid in left)
    assert "stopped by the end of its launcher after step " in finish(process)
    process = start(tmp_path, *TORCHRUN)
    finish(process)
    assert process.returncode == 0 and contents(tmp_path / "out") == straight


@pytest.mark.parametrize("number", [0, 1])
def test_one_is_killed(number: int, tmp_path) -> None:
    process = start(tmp_path, *TORCHRUN)
    wait_for(process, "{'loss'")
    pid = ranks(process)[number]
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    printed = finish(process)
    assert time.monotonic() - begun < 15
    said = [line for line in printed.splitlines() if line.startswith(("stopped", "error"))]
    assert len(said) == 1 and said[0].startswith(f"error: process {number} (pid {pid}) of 2 has ended"), printed
