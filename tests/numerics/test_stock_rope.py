"""Stock rotary embeddings in the place of scaled ones: what is exact, what is nearest, and the same after export."""

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.conftest import FULL, LLAMA3, settings, tiny_config, tiny_model, windows
from tests.numerics.test_exact import difference, stock
from transmla.convert.conversion import convert_model
from transmla.convert.rope import decouple_rope
from transmla.errors import RecipeError
from transmla.families import family_of
from transmla.families.student_config import student_config
from transmla.geometry import derive_geometry
from transmla.geometry.rotary import (
    Band,
    context_for_fixed_betas,
    default_frequencies,
    describe_stock_rope,
    logit_factor,
    natural_bands,
    source_frequencies,
    stock_bands,
    stock_rope,
    yarn_frequencies,
)

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
OF_LLAMA = {
    "Llama-3.1-8B": (LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}, 128),
    "Llama-3.2-1B": (LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192, "factor": 32.0}, 64),
}
POSITIONS = 131072


def source(parameters: dict, dim: int, positions: int = POSITIONS) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=positions,
        rope_parameters=dict(parameters),
    )


@pytest.mark.parametrize("parameters", [LLAMA3, LINEAR, OF_LLAMA["Llama-3.1-8B"][0]])
def test_frequencies_of_a_source_are_those_of_transformers(parameters: dict) -> None:
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](source(parameters, 64), "cpu")
    assert factor == 1.0
    torch.testing.assert_close(source_frequencies(parameters, 64), expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rope", [16, 32, 64])
@pytest.mark.parametrize("name", OF_LLAMA)
def test_llama3_becomes_unscaled_channels_with_the_nearest_frequencies(name: str, rope: int) -> None:
    """Fast frequencies keep their channels, every other one is in the band of the nearest; channels that are nearest to
    none share a band."""
    parameters, dim = OF_LLAMA[name]
    found = stock_rope(source(parameters, dim), dim, dim // rope, rope)
    assert found["parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    collapse = dim // rope
    wanted, given = source_frequencies(parameters, dim)[::collapse], default_frequencies(5e5, rope)
    bands = [Band(b.start // collapse, b.stop // collapse, b.channels) for b in stock_bands(found, 1)]
    assert [band.start for band in bands[1:]] == [band.stop for band in bands[:-1]] and bands[0].start == 0
    for band in bands:
        for index in range(band.start, band.stop):
            error = (wanted[index] - given).abs()
            assert error.argmin() == band.channels[0] and error.min() < wanted[index]
    exact = [band for band in bands if (wanted[band.start : band.stop] == given[band.channels[0]]).any()]
    assert found["exact"] == len(exact) >= 0.45 * rope / 2
    errors = [float((given[b.channels[0]] / wanted[b.start : b.stop] - 1).abs().min()) for b in bands]
    assert found["largest_error"] == pytest.approx(max(errors)) and 0 < max(errors) < 0.6
    used = [channel for band in bands for channel in band.channels]
    assert len(used) == len(set(used)) and found["idle"] == rope // 2 - len(used) <= 3
    assert found["lost"] == dim // 2 - collapse * bands[-1].stop
    assert all(2 * frequency < given[-1] for frequency in wanted[bands[-1].stop :].tolist())


@pytest.mark.parametrize(("theta", "factor", "rope"), [(1e5, 4.0, 64), (1e4, 2.0, 64), (1e4, 8.0, 32), (1e4, 4.0, 16)])
def test_linear_scaling_is_exact_behind_an_idle_channel(theta: float, factor: float, rope: int) -> None:
    """In float64; as transformers computes it; in a padded head of 64; and with the betas that llama.cpp takes."""
    parameters = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    found = stock_rope(source(parameters, 128, 16384), 128, 128 // rope, rope)
    assert (found["idle"], found["exact"], found["largest_error"]) == (1, rope // 2 - 1, 0.0)
    wanted, given = source_frequencies(parameters, 128)[:: 128 // rope], yarn_frequencies(found["parameters"], rope)
    assert given[0] == 1
    torch.testing.assert_close(given[1:], wanted[:-1], rtol=1e-13, atol=0)
    for band in stock_bands(found, 1):
        assert (band.start, band.channels) == ((band.channels[0] - 1) * 128 // rope, (band.channels[0],))
    for size in {rope, 64}:
        config = DeepseekV3Config(qk_rope_head_dim=size, rope_parameters=dict(found["parameters"]))
        computed, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        assert attention_factor == 1.0
        torch.testing.assert_close(computed[:: size // rope].double(), given, rtol=1e-6, atol=0)
        assert context_for_fixed_betas(found["parameters"], size) == 6


@pytest.mark.parametrize(("factor", "rope"), [(1.2, 32), (8.0, 8)])
def test_yarn_makes_no_frequency_larger(factor: float, rope: int) -> None:
    """Where linear scaling is by less than one channel's step, channels are the nearest unscaled ones."""
    parameters = LINEAR | {"factor": factor}
    found = stock_rope(source(parameters, 2 * rope), 2 * rope, 2, rope)
    assert found["parameters"]["rope_type"] == "default" and 0 < found["largest_error"] < 0.5


def test_scaling_that_scales_nothing_becomes_none() -> None:
    parameters = LLAMA3 | {"original_max_position_embeddings": 10**7}
    found = stock_rope(source(parameters, 16), 16, 1, 16)
    assert found["parameters"] == {"rope_type": "default", "rope_theta": 1e4}
    assert stock_bands(found, 2) == natural_bands(2, 1, 8) and found["exact"] == 8
    assert describe_stock_rope(found) == "default: 8 channels turn exactly as frequencies of the source do"


def test_yarn_with_a_ramp_of_its_own_has_no_context_for_other_betas() -> None:
    yarn = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
    assert context_for_fixed_betas(yarn, 64) == context_for_fixed_betas(yarn | {"beta_fast": 32}, 64) == 4096
    assert context_for_fixed_betas(yarn | {"beta_fast": 8.0}, 64) is None


def test_channels_of_no_band_are_zero_and_the_others_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, 16, 25, dtype=torch.float64, generator=generator) for n in (4, 2))
    root = torch.randn(25, 25, dtype=torch.float64, generator=generator)
    shared = query, key, root @ root.T, source_frequencies(LINEAR, 16)
    plain = decouple_rope(*shared, bands=natural_bands(2, 2, 3), channels=3, distance=None)
    moved = [Band(0, 2, (2,)), Band(2, 4, (1,)), Band(4, 6, (4,))]
    found = decouple_rope(*shared, bands=moved, channels=5, distance=None)
    assert torch.equal(found.k_nope, plain.k_nope) and torch.equal(found.q_nope, plain.q_nope)
    into = [2, 1, 4, 7, 6, 9]
    assert torch.equal(found.q_rope[:, into], plain.q_rope) and torch.equal(found.k_rope[into], plain.k_rope)
    assert not found.q_rope[:, [0, 3, 5, 8]].any() and not found.k_rope[[0, 3, 5, 8]].any()


def test_more_channels_than_components_leave_the_last_idle() -> None:
    query, key = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(1, 4, 5, dtype=torch.float64)
    bands = [Band(0, 1, (1, 0)), Band(1, 2, (2,))]
    moment, frequencies = torch.eye(5, dtype=torch.float64), default_frequencies(1e4, 4)
    found = decouple_rope(query, key, moment, frequencies, bands=bands, channels=3, distance=None)
    assert not found.k_rope[[0, 3]].any() and not found.k_nope.abs().gt(1e-12).any()


def converted(parameters: dict, dtype: torch.dtype = torch.float32, **section: object):
    model = tiny_model("llama", groups=1, dtype=dtype, rope_parameters=parameters)
    convert = settings(**(FULL | {"rope": "stock", "refit": False, "mean_rotation": False} | section))
    return model, convert_model(model, convert, torch.cat(windows())).student


@pytest.mark.parametrize("query_rank", [None, 64])
@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize("parameters", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_export_equals_the_student(parameters: dict, layout: str, query_rank: int | None) -> None:
    """DeepSeek multiplies the logits of YaRN by (0.1 ln factor + 1)²; the queries are divided by it."""
    _, student = converted(parameters, q_lora_rank=query_rank)
    assert (logit_factor(student.config.rope_parameters) > 1.04) == (parameters is LINEAR)
    exported = stock(student, layout, torch.float32)
    assert difference(student, exported) <= 1e-5


@pytest.mark.parametrize("parameters", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_the_whole_difference_is_that_of_frequencies(parameters: dict) -> None:
    """The source equals the student, in float64, once its own frequencies are those of the channels, or zero in none;
    of linear scaling that is the slowest one alone."""
    model, student = converted(parameters, torch.float64)
    assert difference(model, student) > 1e-3
    record = stock_rope(model.config, 16, 1, 16)
    given = student.model.rotary_emb.inv_freq.clone()
    frequencies = torch.zeros(8)
    for start, stop, channels in record["bands"]:
        if stop - start > 1:
            pytest.skip("one component stands for several frequencies")
        frequencies[start] = given[channels[0]]
    if parameters is LINEAR:
        own = model.model.rotary_emb.inv_freq
        torch.testing.assert_close(frequencies[:-1], own[:-1].to(frequencies), rtol=1e-6, atol=0)
        assert frequencies[-1] == 0
    model.model.rotary_emb.inv_freq.copy_(frequencies)
    assert difference(model, student) <= 1e-6  # cos and sin come from float32 angles in both


def test_an_unscaled_source_is_left_alone() -> None:
    config = tiny_config("llama")
    kept, stock_too = (derive_geometry(config, settings(**(FULL | {"rope": rope}))) for rope in ("keep", "stock"))
    assert kept == stock_too and kept.stock_rope is None


def test_another_collapse_needs_a_stock_embedding() -> None:
    config = tiny_config("llama", rope_parameters=LLAMA3)
    section = dict(qk_rope_head_dim=8, kv_lora_rank=12, collapse=1)
    with pytest.raises(RecipeError, match="convert.rope=stock"):
        derive_geometry(config, settings(**section))
    found = derive_geometry(config, settings(**section, rope="stock")).stock_rope
    assert found is not None and found["parameters"]["rope_theta"] == pytest.approx(1e4**0.5)


def test_embeddings_by_layer_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^convert.rope: .* use keep$"):
        derive_geometry(tiny_config("gemma3_text"), settings(**(FULL | {"rope": "stock"})))


@pytest.mark.parametrize(("kind", "why"), [("dynamic", "longest position of a batch"), ("longrope", "short and one")])
def test_what_has_no_fixed_frequencies_is_refused_by_name(kind: str, why: str) -> None:
    from transmla.families import family_of

    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(RecipeError, match=f"^model.source: rope type '{kind}' .*{why}"):
        family_of(config).check(config)


@pytest.mark.parametrize("rope", ["keep", "stock"])
@pytest.mark.parametrize("parameters", [None, LLAMA3, LINEAR], ids=["unscaled", "llama3", "linear"])
def test_channels_turn_as_the_students_embedding_does(parameters: dict | None, rope: str) -> None:
    model = tiny_model("llama", **({"rope_parameters": parameters} if parameters else {}))
    geometry = derive_geometry(model.config, settings(qk_rope_head_dim=8, kv_lora_rank=12, rope=rope))
    student = student_config(model.config, geometry, family_of(model.config))
    own = LlamaRotaryEmbedding(student).inv_freq
    found = geometry.channel_frequencies(model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=0)
