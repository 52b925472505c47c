"""Biases as linear features of the input: exact where the input holds a constant, else the least squares."""

from types import SimpleNamespace

import pytest
import torch

from transmla.convert.bias_folding import constant_feature, fold, fold_queries_and_values, fold_rotating_keys
from transmla.families.family import SourceAttention

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
        second_moment=second, mean=mean, averaged=averaged, averaged_mean=average, attended=attended
    )
    done = fold_queries_and_values(source, statistics)
    assert done.key is source.key
    found = {"query": done.query, "value": done.value}
    if part == "key":  # E[sum A x] is the mean of averaged inputs
        rotating = fold_rotating_keys(maps[0], statistics)
        assert rotating[0, 0] == pytest.approx(8.0 * 2.0 / 16.0, rel=1e-3)
    else:
        assert found[part][0, 0, 0] == pytest.approx(8.0 / means[part], rel=1e-3)
