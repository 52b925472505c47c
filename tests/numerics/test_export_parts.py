"""An export that reads the student part by part writes the tensors of one that holds it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.numerics.test_exact import conversion
from tests.unit.test_deepseek_names import CASES
from transmla.export import checkpoint, deepseek_weights
from transmla.export.checkpoint import save_deepseek, save_own_class
from transmla.recipe.schema import Export
from transmla.sources.local_model import stream_model
from transmla.sources.random_model import byte_tokenizer
from transmla.sources.weight_shards import bytes_of


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("case", [*CASES, "own class", "own class, tied"])
def test_part_by_part(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        "own class": ("mixtral", {"num_local_experts": 4}, {}),
        "own class, tied": ("gemma2", {"tie_word_embeddings": True}, {}),
    }
    family, fields, section = (CASES | own)[case]
    _, done = conversion(family, fields, torch.float32, **section)
    student = done.student
    student.save_pretrained(tmp_path / "student", max_shard_size="60KB")
    monkeypatch.setattr(deepseek_weights, "BLOCK", 1000)
    monkeypatch.setattr(checkpoint, "save_tokenizer", lambda *args: None)
    stock = partial(save_deepseek, shifts=done.router_shifts)
    save, chosen = save_own_class if case in own else stock, Export(max_shard_size="0.05MB")
    tokenizer = byte_tokenizer(student.config.__class__(vocab_size=300))
    for name, model in (("parts", stream_model(tmp_path / "student", torch.float32, "cpu")), ("whole", student)):
        (tmp_path / name).mkdir()
        save(model, tokenizer, chosen, torch.bfloat16, tmp_path / name)
    expected, found = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert expected.keys() == found.keys() and ("lm_head.weight" in found) == (case != "own class, tied")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    wider = {name for name, value in expected.items() if value.dtype != torch.bfloat16}
    assert wider == {name for name in expected if case == "experts" and name.endswith("mlp.gate.weight")}
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_sizes_of_files() -> None:
    assert [bytes_of(size) for size in ("5GB", "1.5 kb", "20MB")] == [5 * 10**9, 1500, 20 * 10**6]
