"""Biases as linear features of the input: exact where the input holds a constant, else the least squares."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import FULL, settings, tiny_model, windows
from tests.numerics.test_exact import difference, stock
from transmla.convert.bias_folding import (
    constant_feature,
    fold,
    fold_queries_and_values,
    fold_rotating_keys,
    kept_share,
)
from transmla.convert.conversion import convert_model
from transmla.errors import RecipeError
from transmla.families.family import SourceAttention
from transmla.plan.conversion_checks import check_conversion
from transmla.recipe.compose import load_recipe

TOKENS, WIDTH = 400, 6


def moments(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"moment": x.mT @ x / len(x), "mean": x.mean(0)}


def inputs(*, constant: bool) -> torch.Tensor:
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 3.0 if constant else x[:, 2] + 3.0
    return x


def test_a_constant_of_the_input_carries_the_bias() -> None:
    x = inputs(constant=True)
    maps = torch.randn(2, 4, WIDTH + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    folded = fold(maps, constant_feature(**moments(x)))
    assert not folded[..., -1].any() and maps[..., -1].all()
    wanted = torch.einsum("hwx,nx->nhw", maps[..., :-1], x) + maps[..., -1]
    torch.testing.assert_close(torch.einsum("hwx,nx->nhw", folded[..., :-1], x), wanted, rtol=1e-4, atol=1e-4)


def test_it_is_the_least_squares_of_one() -> None:
    x = inputs(constant=False)
    solved = torch.linalg.lstsq(x, torch.ones(TOKENS, 1, dtype=torch.float64)).solution[:, 0]
    torch.testing.assert_close(constant_feature(**moments(x)), solved, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("part", ["query", "value", "key"])
def test_every_map_has_inputs_of_its_own(part: str) -> None:
    """The feature of queries is asked of all tokens, of values as attention averages them, of keys where it looks."""
    means = {"query": 1.0, "value": 2.0, "key": 4.0}
    eye = torch.eye(WIDTH, dtype=torch.float64)
    one = torch.zeros(WIDTH, dtype=torch.float64)
    one[0] = 1.0

    def of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        mean = means[name] * one
        return eye * 1e-9 + torch.outer(mean, mean), mean

    (second, mean), (averaged, average), (attended, _) = of("query"), of("value"), of("key")
    maps = torch.zeros(1, 2, WIDTH + 1, dtype=torch.float64)
    maps[..., -1] = 8.0
    source = SourceAttention(maps, maps, maps, torch.zeros(WIDTH, 1, 2), None, 1.0)
    statistics = SimpleNamespace(
        second_moment=second,
        mean=mean,
        averaged=averaged,
        averaged_mean=average,
        attended=attended,
        distance=torch.ones(1, 6, dtype=torch.float64) / 6,
    )
    done = fold_queries_and_values(source, statistics)
    assert done.key is source.key
    found = {"query": done.query, "value": done.value}
    if part == "key":  # E[sum A x] is the mean of averaged inputs
        third = torch.tensor([2 * torch.pi / 3], dtype=torch.float64)  # over six distances its mean is zero
        rotating = fold_rotating_keys(maps[0], third, statistics)
        slope = 2.0 / 16.0
        share = 1.0 / (1.0 + 16.0 * slope**2 - 4.0 * slope + 1.0)  # s = 1; E(wx - 1)² = 16 w² - 2·2 w + 1
        assert rotating[0, 0] == pytest.approx(8.0 * slope * share, rel=1e-3)
    else:
        assert found[part][0, 0, 0] == pytest.approx(8.0 / means[part], rel=1e-3)


def test_the_share_of_a_rotating_bias_has_the_least_error() -> None:
    """Against the variance itself, on a grid: what a query sees of a channel's constant once softmax has taken the mean
    off."""
    distance = torch.softmax(torch.linspace(2.0, -2.0, 64, dtype=torch.float64), 0)[None]
    frequencies = torch.tensor([0.0, 1e-3, 1e-2, 1.0], dtype=torch.float64)
    error = torch.tensor(4e-4, dtype=torch.float64)
    found = kept_share(distance, frequencies, error)
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    steps = torch.arange(64, dtype=torch.float64)
    for share, frequency in zip(found, frequencies, strict=True):
        turned = torch.polar(torch.ones_like(steps), steps * frequency)
        constant = (1 - grid)[:, None] * turned  # beside ε, of mean zero and independent: grid² E ε²
        mean = (distance * constant).sum(-1)
        variance = (distance * (constant - mean[:, None]).abs().square()).sum(-1) + grid.square() * error
        assert share == pytest.approx(float(grid[variance.argmin()]), abs=1e-4)
    assert found[0] == 0.0 and found[-1] > 0.99


def leaning_source(share: float):
    """A source with biases whose attentions' inputs point to one side: every token has the same large coordinate, and
    the rest is this share of it."""
    source = tiny_model("qwen2", groups=1)
    with torch.no_grad():
        source.model.embed_tokens.weight.mul_(share)
        source.model.embed_tokens.weight[:, 5] = 1.0
        for layer in source.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.mul_(share)
                writer.weight[5] = 0.0
    return source


@pytest.mark.parametrize(("query_rank", "tied"), [(None, False), (64, False), (None, True)])
def test_a_student_without_biases_equals_its_source(query_rank: int | None, tied: bool) -> None:
    source = leaning_source(0.02)
    section = FULL | {"q_lora_rank": query_rank, "tied": tied}
    done = convert_model(source, settings(**section, biases="fold", refit=False), torch.cat(windows()))
    student = done.student
    assert not [name for name, _ in student.named_parameters() if name.endswith("bias")]
    dropped = convert_model(source, settings(**section, refit=False), torch.cat(windows())).student
    with torch.no_grad():
        for name, parameter in dropped.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert difference(source, student) < 0.02 * difference(source, dropped)


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_its_export_has_no_biases_and_the_dimensions_that_were_asked_for(layout: str) -> None:
    converted = convert_model(leaning_source(0.3), settings(**FULL, biases="fold"), torch.cat(windows()))
    exported = stock(converted.student, layout, torch.float32)
    assert difference(converted.student, exported) <= 1e-5
    config = exported.config
    assert (config.attention_bias, config.q_lora_rank) == (False, None)
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == ((32, 16) if layout == "compact" else (512, 64))
    assert not [name for name in exported.state_dict() if name.endswith("bias")]


def test_a_source_without_biases_is_what_it_was() -> None:
    source = tiny_model("llama")
    one, other = (
        convert_model(source, settings(**FULL, biases=biases), torch.cat(windows())).student.state_dict()
        for biases in ("keep", "fold")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items()) and list(one) == list(other)


def test_a_bias_of_the_output_is_refused_by_name() -> None:
    overrides = ["device=cpu", "+model.config.attention_bias=true", "convert.biases=fold"]
    with pytest.raises(RecipeError, match=r"^convert.biases: .*attention's output.*use keep"):
        check_conversion(load_recipe("debug", overrides), torch.float32, exports=True)
    check_conversion(load_recipe("debug", overrides[:2]), torch.float32, exports=True)


def test_a_large_bias_of_a_slow_channel_drowns_nothing() -> None:
    """Qwen2 has key biases of hundreds where a channel hardly turns: folded as a whole they are noise on all logits."""
    source = leaning_source(0.1)
    source.config.rope_parameters["rope_theta"] = 1e12
    source.model.rotary_emb = type(source.model.rotary_emb)(source.config)
    with torch.no_grad():
        for layer in source.model.layers:
            layer.self_attn.k_proj.bias[7::8] += 100.0  # one key head of 16: pair 7, the slowest, is (7, 15)
    student = convert_model(source, settings(**FULL, biases="fold", refit=False), torch.cat(windows())).student
    with torch.no_grad():
        one, other = (model(windows()[0]).logits.log_softmax(-1) for model in (source, student))
    assert float((one.exp() * (one - other)).sum(-1).mean()) < 1e-3
