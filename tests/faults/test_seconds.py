"""How long a user waits to read what is wrong: every bad input as a command of its own, with all that it imports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.test_bad_inputs import CASES, LAUNCHES, ROOT, given
from tests.faults.test_mistakes import FILES, MISTAKES
from tests.source_folder import copy_of, make_source

BESIDE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1
pytestmark = [pytest.mark.faults, pytest.mark.skipif(BESIDE, reason="seconds are those of one process alone: -n0")]
MOST = 5.0
INPUTS = {
    **{name: (words, key, make, {}) for name, (words, key, _, make) in CASES.items()},
    **{name: (words, key, None, {"MY_SECRET": "open sesame now"}) for name, (words, key, _) in MISTAKES.items()},
    **{name: (["seed=1"], "launch", None, variables) for name, (variables, _) in LAUNCHES.items()},
}
SETTINGS = {"HF_HUB_OFFLINE": "1", "TRANSMLA_DATA": "", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
ELSEWHERE = {"data in no folder": {"TRANSMLA_DATA": "/nowhere"}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "m")


def test_nothing_is_left_out() -> None:
    assert len(INPUTS) == len(CASES) + len(MISTAKES) + len(LAUNCHES) >= 60


@pytest.mark.parametrize("what", INPUTS)
def test_a_command_of_its_own(what: str, source: Path, tmp_path: Path) -> None:
    words, key, make, variables = INPUTS[what]
    copy_of(source, tmp_path / "m")
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    if make is not None:
        make(tmp_path)
    environment = os.environ | SETTINGS | variables | ELSEWHERE.get(what, {})
    command = [sys.executable, str(ROOT / "recover.py"), *given(list(words))]
    started = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith(f"error: {key}"), done.stderr[-2000:]
    print(f"{seconds:.2f} s: {what}")
    assert seconds < MOST, what
