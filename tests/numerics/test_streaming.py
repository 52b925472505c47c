"""A conversion layer by layer gives the tensors of the whole conversion, and holds one layer at a time."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from tests.conftest import settings, tiny_config, tiny_model, windows
from tests.numerics.test_families import CASES
from transmla.convert.conversion import convert_model
from transmla.convert.streaming import StreamedConversion, needs_whole_models, stream_conversion
from transmla.errors import RecipeError
from transmla.recipe.schema import Convert
from transmla.sources.drawn_parts import drawn_model
from transmla.sources.layered_model import LayeredModel, save_configuration
from transmla.sources.local_model import load_model, load_source, stream_source
from transmla.sources.weight_shards import WeightShards

CPU = torch.device("cpu")
SMALL = dict(qk_rope_head_dim=8, kv_lora_rank=12)
TEXT = torch.cat(windows())[:15]  # a last batch that is smaller


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def streamed(source: LayeredModel, section: Convert, folder: Path) -> StreamedConversion:
    """The conversion, its student below `folder`."""
    folder.mkdir()
    shards = WeightShards(folder, 60_000)
    done = stream_conversion(source, section, TEXT, shards.add)
    shards.close()
    done.student.generation_config = source.model.generation_config
    save_configuration(done.student, folder)
    return done


BY_LAYER = dict(refit=False, freqfold="auto")


@pytest.mark.parametrize(
    "case,fields",
    [(case, dict(refit=True, freqfold=2)) for case in CASES]
    + [(case, dict(refit=False, freqfold=2)) for case in ("qwen3", "gemma2")]
    + [("qwen2", dict(BY_LAYER, latent_heads=2)), ("llama", dict(refit=True, freqfold=2, latent_heads=2, tied=True))]
    + [(case, BY_LAYER) for case in ("llama", "qwen2", "mixtral", "gemma2")],
    ids=str,
)
def test_streamed_is_whole(case: str, fields: dict, tmp_path: Path) -> None:
    """To the bit, from and to several files. (Gemma 2's calibration computes its capped attention in blocks, its own
    kernel at once; that is rounding.)"""
    family, more = CASES[case]
    tiny_model(family, **more).save_pretrained(tmp_path / "source", max_shard_size="60KB")
    section = settings(**SMALL, **fields)
    whole = convert_model(load_source(tmp_path / "source", torch.float32, "cpu"), section, TEXT)
    whole.student.save_pretrained(tmp_path / "whole")
    done = streamed(stream_source(tmp_path / "source", torch.float32, "cpu"), section, tmp_path / "streamed")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1 < len(done.seconds)
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    expected, found = read(tmp_path / "whole"), read(tmp_path / "streamed")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6 if family == "gemma2" else 0)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "whole" / name).read_text()) == json.loads(
            (tmp_path / "streamed" / name).read_text()
        )
    assert done.geometry == whole.geometry and done.settings == whole.settings
    assert done.output_scales == pytest.approx(whole.output_scales) and done.key_errors == whole.key_errors
    student = load_model(tmp_path / "streamed", torch.float32, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(student(TEXT[:1]).logits, whole.student(TEXT[:1]).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("without_prefix", [False, True])
def test_other_formats_names_and_a_tied_head(without_prefix: bool, tmp_path: Path) -> None:
    """Stored in float32 and computed in bfloat16; a model that was saved without its head has no prefix."""
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    if without_prefix:
        file = tmp_path / "source" / "model.safetensors"
        save_file(
            {name.removeprefix("model."): value for name, value in load_file(file).items()}, file, {"format": "pt"}
        )
    section = settings(**SMALL, freqfold="auto", latent_norm=True)
    whole = convert_model(load_source(tmp_path / "source", torch.bfloat16, "cpu"), section, TEXT)
    whole.student.save_pretrained(tmp_path / "whole")
    streamed(stream_source(tmp_path / "source", torch.bfloat16, "cpu"), section, tmp_path / "streamed")
    expected, found = read(tmp_path / "whole"), read(tmp_path / "streamed")
    assert expected.keys() == found.keys() and "lm_head.weight" not in found
    for name, value in expected.items():
        assert torch.equal(found[name], value) and value.dtype == found[name].dtype == torch.bfloat16


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "zeros"])
def test_values_that_are_no_numbers(value: str, tmp_path: Path) -> None:
    model = tiny_model()
    weight = model.model.layers[1].mlp.up_proj.weight.data
    if value == "zeros":
        weight.zero_()
    else:
        weight[3, 4] = float(value)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(RecipeError, match=f"layers.1.mlp.up_proj.weight.* {'zeros' if value == 'zeros' else 'NaN'}"):
        streamed(stream_source(tmp_path / "source", torch.float32, "cpu"), settings(**SMALL), tmp_path / "streamed")


def test_a_part_is_drawn_alone() -> None:
    """The layers of a random model do not depend on those before them, nor on how many there are."""
    found = []
    for layers in (2, 5):
        source = drawn_model(tiny_config("mixtral", num_hidden_layers=layers), torch.float32, CPU, "model.config")
        torch.manual_seed(layers)
        with source.part("model.layers.1"):
            found.append({name: value.clone() for name, value in source.tensors("model.layers.1").items()})
        assert torch.initial_seed() == layers
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    stored = revert_weight_conversion(source.model, found[0])
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in stored


def storages() -> dict[int, int]:
    """Bytes of all tensors that are alive, by address."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # compilers of other tests leave tensors of their own, without memory
    alive = [value for value in gc.get_objects() if type(value) in plain and not value.is_meta]
    alive = [value for value in alive if value.layout is torch.strided and not torch._is_functional_tensor(value)]
    return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in alive}


def test_memory_does_not_grow_with_layers() -> None:
    def largest(layers: int) -> int:
        """Most bytes of tensors that are alive when a part of the student is ready, other tests' left out."""
        before, found = storages(), [0]
        source = drawn_model(
            tiny_config(num_hidden_layers=layers, hidden_size=256, intermediate_size=512), torch.float32, CPU, "model"
        )

        def keep(tensors: dict[str, torch.Tensor]) -> None:
            found[0] = max(found[0], sum(size for place, size in storages().items() if place not in before))

        stream_conversion(source, settings(**SMALL, freqfold=2), TEXT, keep)
        return found[0]

    few, many = largest(3), largest(9)
    layer = 4 * (256 * 512 * 3 + 256 * 64 * 2)
    assert layer < few and many - few < layer / 2


@pytest.mark.parametrize(
    "fields,key",
    [
        (dict(mean_rotation="auto"), "mean_rotation"),
        (dict(collapse="auto"), "collapse"),
        (dict(qk_rope_head_dim="auto", kv_lora_rank="auto", cached_values=24), "qk_rope_head_dim"),
        (dict(method="transmla", freqfold="auto"), "freqfold"),
        (dict(freqfold="auto"), None),
        (dict(kv_lora_rank="auto", cached_values=20), None),  # their sum leaves no choice
    ],
)
def test_what_needs_whole_students(fields: dict, key: str | None) -> None:
    assert needs_whole_models(tiny_config(), settings(**(SMALL | {"freqfold": 2} | fields))) == key
