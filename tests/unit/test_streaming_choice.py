"""When a conversion is streamed, what it is refused for, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import all_metadata
from transmla.cli import main
from transmla.convert import streaming
from transmla.errors import RecipeError
from transmla.plan import streaming_choice
from transmla.plan.checks import prepare
from transmla.plan.dry_run import render_plan
from transmla.recipe.compose import load_recipe
from transmla.run.fingerprints import Fingerprints

GIB = 2**30
QWEN72 = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def planned(*overrides: str, **config: object):
    recipe = load_recipe("debug", ["device=cpu", "dry_run=true", *overrides])
    if config:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    return prepare(recipe, exports=not config)


def free(monkeypatch: pytest.MonkeyPatch, host: float, gpu: float = 0) -> None:
    sizes = {"cpu": host, "cuda": gpu}
    monkeypatch.setattr(streaming_choice, "free_memory", lambda device: int(sizes[device.type] * GIB))


def test_auto_follows_the_memory(monkeypatch) -> None:
    free(monkeypatch, 64)
    assert not planned().streaming.on
    free(monkeypatch, 3)
    choice = planned().streaming
    assert choice.on and choice.refusal is None and "of the host's memory, and 3.0 GiB are free" in choice.reason
    assert not planned("convert.streaming=false").streaming.on
    free(monkeypatch, 64)
    assert planned("convert.streaming=true").streaming.on


def test_a_large_model(monkeypatch) -> None:
    """Qwen2.5-72B: whole models fit on no card; layer by layer they take less than half of one."""
    free(monkeypatch, 64)
    dimensions = ("convert.qk_rope_head_dim=64", "convert.kv_lora_rank=512", "dtype=bfloat16")
    prepared = planned(*dimensions, "convert.calibration.max_length=1024", **QWEN72)
    assert prepared.streaming.on and "layer by layer" in render_plan(prepared)
    arguments = prepared.recipe, prepared.config, prepared.sizes, torch.bfloat16
    whole = streaming_choice.whole_needs(*arguments, "cuda")
    part = streaming_choice.streamed_needs(*arguments, "cuda")
    assert whole.device > 200 * GIB < 2 * whole.host and part.device < 40 * GIB and part.host < 24 * GIB


def test_a_gpu_that_is_too_small(monkeypatch) -> None:
    recipe, device = load_recipe("debug"), "cuda"
    prepared = planned()
    for host, gpu, on in ((64, 64, False), (64, 0.001, True), (2, 64, True)):
        free(monkeypatch, host, gpu)
        found = streaming_choice.choose_streaming(recipe, prepared.config, prepared.sizes, torch.float32, device)
        assert found.on == on
        assert not on or ("the GPU" if gpu < 1 else "the host") in found.reason


def test_what_is_searched_is_refused(monkeypatch) -> None:
    with pytest.raises(RecipeError, match="convert.collapse: auto is chosen by comparing whole students"):
        planned("convert.streaming=true", "convert.collapse=auto")
    free(monkeypatch, 3)
    prepared = planned("convert.collapse=auto")
    assert "refused on this machine: convert.collapse" in render_plan(prepared)
    with pytest.raises(RecipeError, match="convert.streaming=false on a machine"):
        prepared.streaming.require()


def test_a_gguf_is_read_whole(monkeypatch) -> None:
    recipe, prepared = load_recipe("debug", ["convert.streaming=true"]), planned()
    packed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": "model.gguf"})})
    with pytest.raises(RecipeError, match="convert.streaming: a GGUF"):
        streaming_choice.choose_streaming(packed, prepared.config, prepared.sizes, torch.float32, "cpu")
    auto = packed.model_copy(update={"convert": packed.convert.model_copy(update={"streaming": "auto"})})
    free(monkeypatch, 1)
    found = streaming_choice.choose_streaming(auto, prepared.config, prepared.sizes, torch.float32, "cpu")
    assert not found.on and "but a GGUF cannot be streamed" in found.reason


def test_the_way_is_no_setting(tmp_path: Path) -> None:
    """A student is current however it was made."""
    digests = {Fingerprints(planned(f"convert.streaming={way}")).convert for way in ("auto", "true", "false")}
    assert len(digests) == 1


@pytest.fixture
def convert(tmp_path: Path):
    def run(way: str, folder: str = "out") -> int:
        words = ["recipe=debug", "device=cpu", f"output_dir={tmp_path / folder}", f"convert.streaming={way}"]
        return main(["convert", *words])

    return run


def test_what_it_leaves(convert, tmp_path: Path, capsys) -> None:
    assert convert("true", "streamed") == convert("false", "whole") == 0
    printed = capsys.readouterr().out
    assert "[convert] layer by layer, because convert.streaming is true" in printed and "2 layers at" in printed
    one, other = (tmp_path / name / "converted" for name in ("streamed", "whole"))
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for name in ("model.safetensors", "statistics.safetensors", "config.json", "tokenizer.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    cost = json.loads((one / "transmla.json").read_text())["streamed"]
    assert len(cost["seconds_by_layer"]) == 2 and cost["peak_host_bytes"] > 0
    assert convert("false", "streamed") == 0
    assert "[convert] unchanged, skipped" in capsys.readouterr().out


def test_nothing_half_is_left(convert, tmp_path: Path, monkeypatch) -> None:
    solve = streaming._Streaming.convert_layer

    def killed(self, index: int):
        if index:
            raise KeyboardInterrupt
        return solve(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(streaming._Streaming, "convert_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            convert("true")
    assert not list((tmp_path / "out").rglob("*.safetensors")) and not all_metadata(tmp_path / "out")
    assert convert("true") == 0 and (tmp_path / "out" / "converted" / "model.safetensors").is_file()
