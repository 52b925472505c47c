"""A failure under `accelerate launch`: our line is the last one where the launcher is told to be quiet."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]
MISSED = "evaluate.require=[{measure: kl, data: sample_heldout, model: exported, at_most: -1.0}]"


def launch(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    command = ["accelerate", "launch", *words, f"output_dir={tmp_path}/out", "device=cpu"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("how", [["--quiet"], ["--config_file", "accelerate_configs/cpu.yaml"]])
@pytest.mark.parametrize(
    "words, last",
    [
        (["recipe=debug", "recover.0.tokens=1"], "error: recover.0.tokens: "),
        (["recipe=debug", "recover=[]", MISSED], "threshold missed: kl of exported on sample_heldout"),
    ],
)
def test_one_line(how: list[str], words: list[str], last: str, tmp_path: Path) -> None:
    done = launch(tmp_path, *how, "recover.py", *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(last)
