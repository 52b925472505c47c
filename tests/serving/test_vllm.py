"""vLLM beside transformers, on tiny checkpoints.

Where vLLM is not in this environment, TRANSMLA_VLLM_PYTHON names the python of one that has it.
"""

from pathlib import Path

import pytest
import torch

from tests.mixtral_export import exported_mixtral
from tests.serving.installed import python_of
from tests.stock_checkpoint import STEPPED, YARN, byte_pairs, stock_checkpoint
from transmla.run.engine_check import check_engine

pytestmark = pytest.mark.serving
COMPACT = {"qk_rope_head_dim": 16}  # 16 + 16: its attention on a CPU takes no head of 24
PADDED = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
CASES = {
    "compact": COMPACT,
    "query latent": {**COMPACT, "q_lora_rank": 32},
    "yarn": {**COMPACT, "rope_parameters": YARN},
    "yarn from channel 1": {**COMPACT, "rope_parameters": STEPPED},
    "padded": PADDED,
    "padded, its own MLA": {**PADDED, "dtype": torch.bfloat16, "initializer_range": 0.06},  # its products are rounded
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    python = python_of("vllm")
    found = check_engine(stock_checkpoint(tmp_path, byte_pairs(), **CASES[name]), "vllm", python=python)
    assert {"log-probabilities", "greedy tokens"} <= {line.what for line in found}, found
    assert [f"{line.what}: {line.detail}" for line in found if line.good is False] == []


@pytest.mark.parametrize("engine", ["vllm", "vllm-transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_chooses_experts_as_transformers_does(engine: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exported_mixtral(tmp_path / "it", dtype=dtype)
    found = check_engine(tmp_path / "it", engine, python=python_of(engine))
    assert {"log-probabilities", "greedy tokens"} <= {line.what for line in found}, found
    assert [f"{line.what}: {line.detail}" for line in found if line.good is False] == []
