"""llama.cpp beside transformers, on tiny checkpoints with everything that its files can hold.

Where llama-cpp-python is not in this environment, TRANSMLA_LLAMA_CPP_PYTHON names the python of one that has it.
"""

from pathlib import Path

import pytest
import torch

from tests.mixtral_export import exported_mixtral
from tests.serving.installed import python_of
from tests.stock_checkpoint import STEPPED, YARN, byte_pairs, sentencepiece, stock_checkpoint
from transmla.export.gguf_file import save_gguf
from transmla.export.gguf_pre_tokenizers import NAMES
from transmla.run.engine_check import check_engine

pytestmark = pytest.mark.serving
TOKENIZERS = {
    "bytes": lambda: byte_pairs(),
    "bytes, first token": lambda: byte_pairs("<|turn|>"),
    "sentencepiece": lambda: sentencepiece(),
    **{
        name: lambda patterns=patterns, ignore=ignore: byte_pairs(patterns=patterns, ignore_merges=ignore)
        for (patterns, ignore), name in NAMES.items()
    },
}
CASES = {
    "plain": {},
    "query latent": {"q_lora_rank": 32},
    "tied": {"tie_word_embeddings": True},
    "yarn": {"rope_parameters": YARN},
    "yarn from channel 1": {"rope_parameters": STEPPED},
    "27 layers": {"num_hidden_layers": 27, "first_k_dense_replace": 27, "initializer_range": 0.05},
    "padded": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
}


def missed(folder: Path, **options: object) -> list[str]:
    """Lines that are no good."""
    found = check_engine(folder, "llama.cpp", python=python_of("llama.cpp"), **options)  # type: ignore[arg-type]
    assert {"log-probabilities", "greedy tokens", "tokens of text"} <= {line.what for line in found}, found
    return [f"{line.what}: {line.detail}" for line in found if line.good is False]


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    assert missed(stock_checkpoint(tmp_path, byte_pairs(), **CASES[name])) == []


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_makes_the_same_tokens(name: str, tmp_path: Path) -> None:
    assert missed(stock_checkpoint(tmp_path, TOKENIZERS[name]())) == []


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_k_m"])
def test_it_reads_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    folder = stock_checkpoint(
        tmp_path / "exported", byte_pairs(), dtype=torch.bfloat16, hidden_size=256, initializer_range=0.06
    )
    save_gguf(folder, tmp_path / "it.gguf", kind, python=python_of("llama.cpp"))
    assert missed(folder, gguf=tmp_path / "it.gguf") == []


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_k_m"])
def test_it_reads_experts_in_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    dtype = torch.float32 if kind == "f32" else torch.bfloat16
    exported_mixtral(tmp_path / "it", dtype=dtype, hidden_size=256, intermediate_size=256, initializer_range=0.05)
    save_gguf(tmp_path / "it", tmp_path / "it.gguf", kind, python=python_of("llama.cpp"))
    assert missed(tmp_path / "it", gguf=tmp_path / "it.gguf") == []


def test_another_model_is_a_miss(tmp_path: Path) -> None:
    folder = stock_checkpoint(tmp_path / "one", byte_pairs())
    other = stock_checkpoint(tmp_path / "other", byte_pairs(), initializer_range=0.21)
    save_gguf(other, tmp_path / "it.gguf", "f32")
    assert len(missed(folder, gguf=tmp_path / "it.gguf")) >= 1


def test_it_takes_some_depths_for_another_model(tmp_path: Path, monkeypatch) -> None:
    """Why those are refused: with a query latent 27 layers do not load."""
    fields = dict(num_hidden_layers=27, first_k_dense_replace=27, q_lora_rank=16)
    folder = stock_checkpoint(tmp_path / "it", byte_pairs(), **fields)
    monkeypatch.setattr("transmla.export.gguf_file.unreadable", lambda config: None)
    save_gguf(folder, tmp_path / "it.gguf", "f32")
    found = check_engine(folder, "llama.cpp", python=python_of("llama.cpp"), gguf=tmp_path / "it.gguf")
    assert [line.what for line in found] == ["engine table", "llama.cpp"]
    assert found[-1].detail.startswith("it does not run the checkpoint: ")
