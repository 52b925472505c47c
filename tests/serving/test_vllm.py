"""vLLM beside transformers, on tiny checkpoints.

Where vLLM is not in this environment, TRANSMLA_VLLM_PYTHON names the python of one that has it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stock_checkpoint import STEPPED, YARN, byte_pairs, stock_checkpoint
from transmla.run.engine_check import check_engine

PYTHON = Path(os.environ.get("TRANSMLA_VLLM_PYTHON", sys.executable))
FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"  # an import takes half a minute
THERE = subprocess.run([str(PYTHON), "-c", FIND], capture_output=True).returncode == 0
pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not THERE, reason="vLLM is not installed: TRANSMLA_VLLM_PYTHON names a python"),
]
CASES = {
    "compact": {},
    "query latent": {"q_lora_rank": 32},
    "yarn": {"rope_parameters": YARN},
    "yarn from channel 1": {"rope_parameters": STEPPED},
    "padded": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    found = check_engine(stock_checkpoint(tmp_path, byte_pairs(), **CASES[name]), "vllm", python=PYTHON)
    assert {"log-probabilities", "greedy tokens"} <= {line.what for line in found}, found
    assert [f"{line.what}: {line.detail}" for line in found if line.good is False] == []
