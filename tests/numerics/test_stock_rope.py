"""Stock rotary embeddings in the place of scaled ones: what is exact, what is nearest, and the same after export."""

import math

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.conftest import FULL, LLAMA3, settings, tiny_config, tiny_model, windows
from tests.numerics.test_exact import TOKENS, difference, stock
from transmla.convert.conversion import convert_model
from transmla.convert.rope import decouple_rope
from transmla.errors import RecipeError
from transmla.geometry import derive_geometry
from transmla.rotary import logit_factor, source_frequencies, stock_rope, yarn_frequencies

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


@pytest.mark.parametrize("rope", [4, 16, 32, 64])
@pytest.mark.parametrize("name", OF_LLAMA)
def test_what_is_chosen_is_what_transformers_computes(name: str, rope: int) -> None:
    """Also in a padded head of 64, of which every (64 / rope)th channel is used."""
    parameters, dim = OF_LLAMA[name]
    found = stock_rope(source(parameters, dim), dim, dim // rope, rope)["parameters"]
    for size in {rope, 64}:
        config = DeepseekV3Config(qk_rope_head_dim=size, max_position_embeddings=POSITIONS, rope_parameters=dict(found))
        given, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        assert factor == 1.0
        torch.testing.assert_close(
            given[:: size // rope].double(), yarn_frequencies(found, rope), rtol=1e-6, atol=0, msg=f"{size}"
        )


@pytest.mark.parametrize("name", OF_LLAMA)
def test_only_the_ramp_of_llama3_differs(name: str) -> None:
    """The fast channels are unchanged, the slow ones divided by the factor; no other whole bounds are nearer."""
    parameters, dim = OF_LLAMA[name]
    found = stock_rope(source(parameters, dim), dim, dim // 64, 64)
    wanted, given = source_frequencies(parameters, dim)[:: dim // 64], yarn_frequencies(found["parameters"], 64)
    plain = 5e5 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ratio = wanted / plain
    ends = (ratio == 1) | ((ratio * parameters["factor"] - 1).abs() < 1e-12)
    wrong = (given / wanted - 1).abs() > 1e-9
    assert found["channels_changed"] == int(wrong.sum()) <= 4 and not (wrong & ends)[:14].any()
    assert found["largest_error"] == pytest.approx(float((given / wanted - 1).abs().max()))

    def cost(frequencies: torch.Tensor) -> float:
        steps = torch.logspace(0, math.log10(POSITIONS), 500, dtype=torch.float64)
        return float((2 - 2 * torch.cos(torch.outer(steps, wanted - frequencies))).mean())

    index = torch.arange(32, dtype=torch.float64)
    ramps = (((index - low) / (high - low)).clamp(0, 1) for low in range(32) for high in range(low + 1, 40))
    best = min(cost(plain * (1 - ramp + ramp / parameters["factor"])) for ramp in ramps)
    assert cost(given) <= 1.02 * best < 0.25 * cost(plain)


@pytest.mark.parametrize(("theta", "factor", "rope"), [(1e5, 4.0, 64), (1e4, 2.0, 64), (1e4, 8.0, 32), (1e4, 4.0, 16)])
def test_linear_scaling_is_exact_behind_an_idle_channel(theta: float, factor: float, rope: int) -> None:
    parameters = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    found = stock_rope(source(parameters, 128, 16384), 128, 128 // rope, rope)
    wanted, given = source_frequencies(parameters, 128)[:: 128 // rope], yarn_frequencies(found["parameters"], rope)
    assert found["idle_channels"] == 1 and given[0] == 1
    torch.testing.assert_close(given[1:], wanted[:-1], rtol=1e-13, atol=0)


@pytest.mark.parametrize(("factor", "rope", "idle", "error"), [(1.2, 32, 0, 0.2), (8.0, 8, 1, 0.6)])
def test_yarn_makes_no_frequency_larger(factor: float, rope: int, idle: int, error: float) -> None:
    """A factor below a channel's step has no exact embedding; then the first channel, or all others, are near."""
    parameters = LINEAR | {"factor": factor}
    dim = 2 * rope
    found = stock_rope(source(parameters, dim, 4096), dim, 2, rope)
    assert (found["idle_channels"], found["parameters"]["rope_type"]) == (idle, "default" if idle else "yarn")
    assert found["channels_changed"] >= 1 and 0 < found["largest_error"] <= error + 1e-9


def test_scaling_that_scales_nothing_becomes_none() -> None:
    parameters = LLAMA3 | {"original_max_position_embeddings": 10**7}
    found = stock_rope(source(parameters, 16), 16, 1, 16)
    assert found["parameters"] == {"rope_type": "default", "rope_theta": 1e4} and found["channels_changed"] == 0


def test_an_idle_channel_changes_no_logit() -> None:
    """Channels behind it are those of a head without it, in order."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, 16, 25, dtype=torch.float64, generator=generator) for n in (4, 2))
    root = torch.randn(25, 25, dtype=torch.float64, generator=generator)
    fields = dict(freqfold=2, collapse=2, distance=None)
    frequencies = source_frequencies(LINEAR, 16)
    plain = decouple_rope(query, key, root @ root.T, frequencies, channels=3, **fields)
    idle = decouple_rope(query, key, root @ root.T, frequencies, channels=4, idle=1, **fields)
    assert torch.equal(idle.k_nope, plain.k_nope) and torch.equal(idle.q_nope, plain.q_nope)
    behind = [1, 2, 3, 5, 6, 7]
    assert torch.equal(idle.q_rope[:, behind], plain.q_rope) and torch.equal(idle.k_rope[behind], plain.k_rope)
    assert not idle.q_rope[:, [0, 4]].any() and idle.k_rope[[0, 4]].any()


def converted(parameters: dict, **section: object):
    model = tiny_model("llama", groups=1, dtype=torch.float32, rope_parameters=parameters)
    return model, convert_model(
        model, settings(**(FULL | {"rope": "stock", "refit": False} | section)), torch.cat(windows())
    ).student


@pytest.mark.parametrize("query_rank", [None, 64])
@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize("parameters", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_export_equals_the_student(parameters: dict, layout: str, query_rank: int | None) -> None:
    """DeepSeek multiplies the logits of YaRN by (0.1 ln factor + 1)²; the queries are divided by it."""
    _, student = converted(parameters, q_lora_rank=query_rank)
    assert logit_factor(student.config.rope_parameters) > 1.04
    exported = stock(student, layout, torch.float32)
    assert exported.config.rope_parameters["rope_type"] == "yarn"
    assert difference(student, exported) <= 1e-5


def test_a_source_that_turns_like_the_student_is_equalled() -> None:
    """The whole difference is the frequencies': with the student's own in the source nothing is left."""
    model, student = converted(LLAMA3)
    assert difference(model, student) > 1e-3
    model.model.rotary_emb.inv_freq.copy_(student.model.rotary_emb.inv_freq)
    assert difference(model, student) <= 1e-5
    assert TOKENS.shape[1] > 2


def test_linear_scaling_loses_only_its_slowest_frequency() -> None:
    """... whose rotation becomes a constant: the source with that frequency at zero is the student, in float64."""
    model = tiny_model("llama", groups=1, dtype=torch.float64, rope_parameters=LINEAR)
    section = settings(**(FULL | {"rope": "stock", "mean_rotation": False, "refit": False}))
    student = convert_model(model, section, torch.cat(windows())).student
    model.model.rotary_emb.inv_freq[-1] = 0
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
    wanted = source_frequencies(LLAMA3, 16)[:4]
    assert found is not None and found["parameters"]["rope_theta"] == pytest.approx(1e4**0.5)
    assert float(wanted[0]) == 1.0 and found["channels"] == 4


def test_embeddings_by_layer_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^convert.rope: .* use keep$"):
        derive_geometry(tiny_config("gemma3_text"), settings(**(FULL | {"rope": "stock"})))
