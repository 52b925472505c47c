"""Tiny models and text that every test may use; nothing here touches the network."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Workers share the cores out, before torch and whatever they start read it: two threads on one core wait for each
# other in every product, which made training ten times slower.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from transmla.export.fresh_process import score
from transmla.families import default_kernel
from transmla.recipe.schema import Calibration, Convert
from transmla.run.artifacts import METADATA

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCAB = 97


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """Models that recipes make are cached for the session, not in the user's home."""
    os.environ["TRANSMLA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield


class InThisProcess:
    """In place of the fresh process of a reload check."""

    waits = True

    def __init__(self, *, stock: bool) -> None:
        self.stock = stock

    def end(self) -> None: ...

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def score(self, folder: Path, tokens: torch.Tensor, *, by_module: bool = False) -> torch.Tensor:
        return score(folder, tokens, stock=self.stock, by_module=by_module)


@contextmanager
def quickly():
    """Recipes without figures, and the reload check without a fresh process; tests/recipes/test_debug.py has both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transmla.report.render.plot_figures", lambda *args: None)
        patch.setattr("transmla.export.reload_check.FreshProcess", InThisProcess)
        patch.setattr("transmla.run.context.FreshProcess", InThisProcess)
        yield


@pytest.fixture
def quick():
    with quickly():
        yield


def all_metadata(root: Path) -> dict[str, dict[str, Any]]:
    """The metadata of all finished artifacts below a folder, by relative path."""
    return {str(file.parent.relative_to(root)): json.loads(file.read_text()) for file in sorted(root.rglob(METADATA))}


def tiny_config(family: str = "llama", *, groups: int = 2, **fields: object) -> PretrainedConfig:
    """A configuration of 2 layers, 4 heads of 16 and hidden 64 (so 4·16 = D, every map can be of full rank)."""
    common = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.08,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoConfig.for_model(family, **(common | fields))


def tiny_model(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, leaning: bool = False, **fields: object
) -> PreTrainedModel:
    """A random model with attention far from uniform, non-zero biases and norms other than one.

    leaning: its states point to one side, as those of trained models do, because every embedding has the same vector
    added; its routers, where it has some, are decided.
    """
    torch.manual_seed(1)
    config = tiny_config(family, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=default_kernel(family)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(2)
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            if leaning and name.endswith("embed_tokens.weight"):
                parameter.add_(3.0 * parameter[7].clone())
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(4.0 if leaning else 1.0)
            if "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(float(family.startswith("gemma")))  # Gemma multiplies by 1 + weight
    return model


def settings(**fields: object) -> Convert:
    """A conversion section."""
    return Convert(**({"calibration": Calibration(data=["unused"], max_length=32)} | fields))


def windows(count: int = 16, length: int = 32) -> list[torch.Tensor]:
    """Random calibration batches [4, length]."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCAB, (4, length), generator=generator) for _ in range(count // 4)]


FULL = dict(qk_rope_head_dim=16, kv_lora_rank=32, freqfold=1)  # nothing is truncated with one key head
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
