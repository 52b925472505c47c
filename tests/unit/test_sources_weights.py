"""Weights that are not those of the configuration are refused from their headers, before anything is loaded."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.source_folder import WEIGHTS, assert_refused, copy_of, edit_json, edit_weights, make_source, shard
from transmla.errors import RecipeError
from transmla.sources.config import read_config
from transmla.sources.local_model import load_model, load_source
from transmla.sources.weights import check_weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 269060552\n".format("0" * 64)
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model", tie_word_embeddings=False)


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda w: {change(name): value for name, value in w.items()})


def without(*parts: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(
        folder, lambda w: {name: value for name, value in w.items() if not any(part in name for part in parts)}
    )


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda w: w | {Q: w[Q].to(dtype)})


def config(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **fields)


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes())) and None


def _shard_lost(folder: Path) -> None:
    shard(folder)[1].unlink()


def _shard_pointer(folder: Path) -> None:
    shard(folder)[0].write_text(POINTER)


def _index_broken(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')


def _index_outside(folder: Path) -> None:
    shard(folder)
    index = {"weight_map": {Q: "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _wrong_shape(weights: dict[str, Tensor]) -> None:
    weights[Q] = weights[Q][:-1]


def _more(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.self_attn.r_proj.weight"] = torch.ones(4, 4)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a prefix more": (renamed(lambda name: f"module.{name}"), "21 tensors (lm_head.weight, "),
    "another prefix": (renamed(lambda name: name.replace("model.", "transformer.")), "missing; 20 tensors"),
    "no head": (without("lm_head"), "1 tensor (lm_head.weight) missing"),
    "no matrix": (without("layers.1.self_attn.v_proj"), "1 tensor (model.layers.1.self_attn.v_proj.weight) missing"),
    "no layer": (without(".layers.1."), "9 tensors (model.layers.1.input_layernorm.weight, "),
    "a tensor more": (lambda folder: edit_weights(folder, _more), "(model.layers.0.self_attn.r_proj.weight) left over"),
    "fewer layers": (config(num_hidden_layers=1), "9 tensors (model.layers.1.input_layernorm.weight, "),
    "more layers": (config(num_hidden_layers=3), "9 tensors (model.layers.2.input_layernorm.weight, "),
    "another width": (config(intermediate_size=128), "(96x64 stored, 128x64 wanted)"),
    "another shape": (lambda folder: edit_weights(folder, _wrong_shape), f"{Q} (63x64 stored, 64x64 wanted)"),
    "more heads": (config(num_attention_heads=8), "of another shape"),
    "cut off": (content(lambda raw: raw[: len(raw) // 2]), "bytes where its header describes"),
    "cut in the header": (content(lambda raw: raw[:100]), "its header is cut off"),
    "too long": (content(lambda raw: raw + b"\0"), "bytes where its header describes"),
    "empty": (content(lambda raw: b""), "its header is cut off"),
    "zeros": (content(lambda raw: bytes(len(raw))), "does not begin with a header"),
    "noise": (content(lambda raw: struct.pack("<Q", 64) + os.urandom(9000)), "does not begin with a header"),
    "places": (
        content(lambda raw: raw.replace(b'"data_offsets":[0,', b'"data_offsets":[4,')),
        "does not fit its shape",
    ),
    "a pointer": (content(lambda raw: POINTER.encode()), "Git LFS"),
    "a shard lost": (_shard_lost, "model-00002-of-00002.safetensors is not there"),
    "a shard's pointer": (_shard_pointer, "model-00001-of-00002.safetensors is a pointer of Git LFS"),
    "a broken index": (_index_broken, "it is no index of weights"),
    "an index that leaves the folder": (_index_outside, "'../outside.safetensors'"),
    "pickled": (_pickled, "pickled weights alone (pytorch_model.bin)"),
    "none": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
    "int8": (cast(torch.int8), f"1 tensor ({Q})"),
    "fp8": (cast(torch.float8_e4m3fn), "are quantised (F8_E4M3)"),
    "declared quantised": (config(quantization_config={"quant_method": "fp8"}), "quantization_config: fp8"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}") and None, "merge it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_that_do_not_fit_are_refused_in_the_plan(untied: Path, tmp_path: Path, capsys, damage: str) -> None:
    assert_refused(untied, tmp_path, capsys, *DAMAGE[damage])


def test_what_transformers_reads_is_accepted(untied: Path, tmp_path: Path) -> None:
    """Shards; a model saved without its prefix; buffers of the first Llamas; both names of a tied matrix."""
    whole = load_source(untied, torch.float32, "cpu").state_dict()
    tied = make_source(tmp_path / "tied", tie_word_embeddings=True)
    cases: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "shards": (untied, shard),
        "no prefix": (untied, renamed(lambda name: name.removeprefix("model."))),
        "buffer": (untied, lambda f: edit_weights(f, lambda w: w | {f"{Q[:25]}.rotary_emb.inv_freq": torch.ones(8)})),
        "both": (tied, lambda f: edit_weights(f, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] * 1})),
    }
    for name, (source, change) in cases.items():
        folder = copy_of(source, tmp_path / name)
        change(folder)
        check_weights(folder, read_config(folder, "k"), "k")
        state = load_source(folder, torch.float32, "cpu").state_dict()
        if source is untied:
            assert all(torch.equal(state[key], whole[key]) for key in whole), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3_text", "mimo"])
def test_every_family_passes_and_misses_a_matrix(family: str, tmp_path: Path) -> None:
    """Mixtral's file has one matrix per expert, the model one for all of them; MiMo's has layers that are dropped."""
    more = {"num_local_experts": 3, "num_experts_per_tok": 2} if family == "mixtral" else {}
    folder = make_source(tmp_path / "model", family, **more)
    found = read_config(folder, "k")
    if family == "mimo":
        edit_weights(folder, lambda w: w | {"model.mtp_layers.0.input_proj.weight": torch.ones(2, 2)})
    check_weights(folder, found, "k")
    lost = "experts.1.w1" if family == "mixtral" else "layers.1.mlp.up_proj"
    without(lost)(folder)
    with pytest.raises(RecipeError, match="k: .* do not fit"):
        check_weights(folder, found, "k")


def test_the_loading_report_is_the_last_line(untied: Path, tmp_path: Path, monkeypatch) -> None:
    """Whoever loads a directory, and whatever was checked before: no weight is made up."""
    folder = copy_of(untied, tmp_path / "model")
    without("layers.0.mlp.down_proj")(folder)
    with pytest.raises(RecipeError, match=r"output_dir: .*1 tensor \(model.layers.0.mlp.down_proj.weight\) missing"):
        load_model(folder, torch.float32, "cpu")
    with pytest.raises(RecipeError, match=r"model.source: .*1 tensor \(model.layers.0.mlp.down_proj.weight\) missing"):
        load_source(folder, torch.float32, "cpu")


def _set(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[7] = value

    return change


@pytest.mark.parametrize(
    "change,dtype,reason",
    [
        (_set(Q, float("nan")), torch.float32, f"1 tensor \\({Q}\\).* NaN, infinite or too large for float32"),
        (_set("model.layers.1.mlp.up_proj.weight", float("-inf")), torch.bfloat16, "layers.1.mlp.up_proj"),
        (_set("model.norm.weight", 1e30), torch.float16, "model.norm.weight.*too large for float16"),
        (lambda w: w | {Q: w[Q] * 0}, torch.float32, "nothing but zeros"),
    ],
)
def test_weights_that_are_no_numbers_are_named(untied, tmp_path, monkeypatch, change, dtype, reason) -> None:
    folder = copy_of(untied, tmp_path / "model")
    edit_weights(folder, change)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(RecipeError, match=f"model.source: .*{reason}"):
        load_source(folder, dtype, "cpu")


def test_a_head_that_is_not_the_embedding_is_no_tied_one(untied: Path, tmp_path: Path) -> None:
    folder = copy_of(untied, tmp_path / "model")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(RecipeError, match="tie_word_embeddings to false"):
        load_source(folder, torch.float32, "cpu")
