"""A tiny source model in a directory, and ways to damage it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import tiny_config
from transmla.cli import main
from transmla.recipe.model_source import ModelSource
from transmla.sources.random_model import make_random_model

WEIGHTS = "model.safetensors"


def make_source(folder: Path, family: str = "llama", **fields: Any) -> Path:
    """A random model of 2 layers with a tokenizer of one token per byte."""
    facts = tiny_config(family, vocab_size=260, max_position_embeddings=512, **fields).to_dict()
    known = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    known += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range")
    known += ("eos_token_id", "pad_token_id", "tie_word_embeddings")
    config = {name: facts[name] for name in known if name in facts} | fields
    make_random_model(ModelSource(source="random", config=config), folder)
    return folder


def make_leaning_mixtral(folder: Path, **fields: Any) -> Path:
    """A random Mixtral whose states point to one side, as `tiny_model`'s with `leaning`."""
    make_source(folder, "mixtral", num_local_experts=4, num_experts_per_tok=2, **fields)

    def lean(weights: dict[str, Tensor]) -> None:
        table = weights["model.embed_tokens.weight"]
        weights["model.embed_tokens.weight"] = table + 3.0 * table[7]
        for name in weights:
            if name.endswith(".gate.weight"):
                weights[name] = 4.0 * weights[name]

    edit_weights(folder, lean)
    return folder


def copy_of(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    return out


def edit_json(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    content |= fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    """Write the weights again as `change` returns them, or as it left them."""
    weights = load_file(folder / WEIGHTS)
    weights = change(weights) or weights
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def shard(folder: Path) -> list[Path]:
    """Split the weights into two shards with an index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    parts = {f"model-0000{index + 1}-of-00002.safetensors": names[index::2] for index in range(2)}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / file for file in parts]


def assert_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], reason: str
) -> None:
    """A changed copy of a source is refused in the plan, in one line that names the reason."""
    folder = copy_of(source, tmp_path / "model")
    change(folder)
    line = refusal(folder, tmp_path, capsys, "dry_run=true")
    assert line.startswith("error: model.source: ") and reason in line


def refusal(folder: Path | str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line with which a recipe of this source is refused, before a model is loaded or anything is written."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(
            "transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("a model was loaded")
        )
        patched.setattr("builtins.input", lambda *a: pytest.fail("a question was asked"))
        out = tmp_path / "out"
        code = main(
            ["recover", "recipe=debug", "device=cpu", f"model={{source:'{folder}'}}", f"output_dir={out}", *words]
        )
    printed = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(printed) == 1, printed
    assert not out.exists()
    return printed[0]
