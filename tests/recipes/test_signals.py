"""A run that signals stop, in training and outside of it, and that the same command finishes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.recipe import contents

ROOT = Path(__file__).resolve().parents[2]
STAGES = "recover=[{kind: layerwise, data: [sample_train], tokens: 25600, trainer: {max_length: 128, %s}}]"
RATES = "per_device_train_batch_size: 2, learning_rate: 1.0e-3, save_steps: 1000, logging_steps: 1"


def start(folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """The debug recipe in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "recover.py"), "recipe=debug", "device=cpu", "output_dir=out"]
        + [STAGES % RATES],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    """Read what a run prints until a line that begins so."""
    assert process.stdout is not None
    assert any(printed.startswith(line) for printed in process.stdout), process.communicate()[1][-3000:]


def stop_after(process: subprocess.Popen[str], line: str, number: int) -> tuple[str, float]:
    """Send a signal when a line has been printed; the last line of stderr, and the seconds until the end."""
    wait_for(process, line)
    begun = time.monotonic()
    process.send_signal(number)
    printed = process.communicate(timeout=60)[1]
    assert "Traceback" not in printed
    return printed.splitlines()[-1], time.monotonic() - begun


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("straight")
    process = start(folder)
    printed = process.communicate()[1]
    assert process.returncode == 0, printed[-3000:]
    return contents(folder / "out")


@pytest.mark.faults  # minutes long
def test_stopped_again_and_again(straight: dict[str, str], tmp_path) -> None:
    """The weights are those of the run that was not stopped, to the last bit."""
    out = tmp_path / "out"
    for number, line, where in (
        (signal.SIGUSR1, "[convert] ...", ""),
        (signal.SIGTERM, "{'loss'", " of 100 of recover.0"),
        (signal.SIGINT, "{'loss'", " of 100 of recover.0"),
        (signal.SIGTERM, "[export] ...", ""),
    ):
        process = start(tmp_path)
        last, seconds = stop_after(process, line, number)
        assert process.returncode == 128 + number and seconds < 20
        assert last.startswith("stopped by ") and last.endswith(f"{where}; the same command goes on")
        assert not list(out.rglob(".partial*")), last
    process = start(tmp_path)
    process.communicate()
    assert process.returncode == 0 and contents(out) == straight


def test_a_second_run_is_refused_while_the_first_is_there(tmp_path) -> None:
    first = start(tmp_path)
    wait_for(first, "[convert] ...")
    first.send_signal(signal.SIGSTOP)
    second = start(tmp_path)
    printed = second.communicate()[1]
    first.kill()
    first.communicate()
    assert second.returncode == 2 and len(printed.splitlines()) == 1
    assert printed.startswith(f"error: output_dir: out is in use by a run, process {first.pid} on ")
