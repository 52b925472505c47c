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
    seen_bias,
    turned_moments,
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
        third = torch.tensor([2 * torch.pi / 3], dtype=torch.float64)  # over six distances its mean is zero: S = N
        rotating = fold_rotating_keys(maps[0], torch.eye(2, dtype=torch.float64)[None], third, statistics)
        assert rotating[0, 0] == pytest.approx(8.0 * 2.0 / 16.0, rel=1e-3)
    else:
        assert found[part][0, 0, 0] == pytest.approx(8.0 / means[part], rel=1e-3)


def test_turned_moments_are_the_sums() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(50, 2, 6, dtype=torch.float64, generator=generator) + 1.0
    distance = torch.rand(2, 9, dtype=torch.float64, generator=generator)
    distance /= distance.sum(-1, keepdim=True)
    frequencies = torch.tensor([1.0, 0.3, 0.001], dtype=torch.float64)
    steps = torch.arange(9, dtype=torch.float64)
    phase = torch.polar(torch.ones(9, 3, dtype=torch.float64), torch.outer(steps, frequencies))
    z = torch.complex(*queries.chunk(2, dim=-1))[:, :, None] * phase  # [n, H, L, N]
    u = torch.cat((z.real, z.imag), dim=-1)
    wanted = torch.einsum("hl,nhlp,nhlq->pq", distance, u, u) / 50
    mean = torch.einsum("hl,nhlp->nhp", distance, u)
    moments = torch.einsum("nhp,nhq->hpq", queries, queries) / 50
    whole, apart = turned_moments(moments, distance, frequencies)
    torch.testing.assert_close(whole, wanted)
    torch.testing.assert_close(apart, torch.einsum("nhp,nhq->pq", mean, mean) / 50)


def test_no_other_bias_is_seen_less() -> None:
    """The variance itself, for a w·x of mean and second moment 1 - E ε², beside its neighbours."""
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(30, 4, dtype=torch.float64, generator=generator) + 2.0
    distance = torch.softmax(torch.linspace(2.0, -2.0, 64, dtype=torch.float64), 0)[None]
    frequencies, bias = torch.tensor([0.3, 1e-3]).double(), torch.tensor([3.0, 200.0, -2.0, 100.0]).double()
    whole, mean = turned_moments((queries.mT @ queries / 30)[None], distance, frequencies)
    error = 4e-4
    found = seen_bias(bias, torch.tensor(error), whole, mean)

    def variance(beta: torch.Tensor) -> float:
        square = bias @ whole @ bias + (1 - error) * (beta @ whole @ beta - 2 * bias @ whole @ beta)
        rest = bias - (1 - error) * beta
        return float(square - rest @ mean @ rest)

    for step in torch.randn(20, 4, dtype=torch.float64, generator=generator):
        assert variance(found) < variance(found + 0.1 * step)
    assert variance(found) < 0.2 * min(variance(bias), variance(0 * bias))


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


def centred_logits(query: torch.Tensor, key: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Logits [T, T] of rotated queries and keys [T, P], as softmax sees them: a query's mean over keys taken off."""
    turned = [torch.complex(*half.chunk(2, dim=-1)) for half in (query, key)]
    phase = torch.polar(
        torch.ones(len(key), len(frequencies)).double(), torch.outer(torch.arange(len(key)), frequencies)
    )
    logits = ((turned[0] * phase) @ (turned[1] * phase).mH).real
    return logits - logits.mean(1, keepdim=True)


def test_a_large_bias_of_a_slow_channel_drowns_nothing() -> None:
    """Qwen2 has key biases of hundreds where a channel hardly turns: folded as a whole they are noise on all logits."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, WIDTH, dtype=torch.float64, generator=generator)
    x[:, 2] = 3.0 + 0.1 * x[:, 2]
    query = torch.randn(200, 4, dtype=torch.float64, generator=generator)
    maps = torch.randn(4, WIDTH + 1, dtype=torch.float64, generator=generator)
    maps[:, -1] = torch.tensor([2.0, 300.0, -2.0, 200.0])  # channels 0 and 1: real parts, imaginary parts
    frequencies = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    statistics = SimpleNamespace(
        attended=x.mT @ x / len(x),
        averaged_mean=x.mean(0),
        distance=torch.ones(1, 200, dtype=torch.float64) / 200,
    )

    def error(folded: torch.Tensor) -> float:
        wanted, found = (x @ one[:, :-1].mT + one[:, -1] for one in (maps, folded))
        off = centred_logits(query, found, frequencies) - centred_logits(query, wanted, frequencies)
        return float(off.square().mean() / centred_logits(query, wanted, frequencies).square().mean())

    whole = fold(maps, constant_feature(statistics.attended, statistics.averaged_mean))
    nothing = torch.cat((maps[:, :-1], torch.zeros(4, 1).double()), dim=1)
    moment = (query.mT @ query / len(query))[None]
    found = error(fold_rotating_keys(maps, moment, frequencies, statistics))
    assert found < 0.01 * error(whole) and found < 0.1 * error(nothing)
