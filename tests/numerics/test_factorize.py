"""Weighted low rank against the Eckart-Young optimum."""

import torch

from transmla.convert.low_rank import joint_key_value, joint_two_moments, low_rank, symmetric_root


def spd(*shape: int) -> torch.Tensor:
    root = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return root @ root.mT


def weighted_error(maps, moment, weights, down, up) -> torch.Tensor:
    rest = maps - up @ down
    return torch.einsum("nwx,xy,nvy,nvw->", rest, moment, rest, weights)


def test_symmetric_root() -> None:
    matrix = spd(3, 6)
    root, inverse = symmetric_root(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=torch.float64).expand(3, -1, -1))


def test_full_rank_is_exact() -> None:
    maps = torch.randn(4, 6, 40, dtype=torch.float64)
    down, up = low_rank(maps, spd(40), spd(4, 6), 24)
    torch.testing.assert_close(up @ down, maps)


def test_truncation_is_the_optimum() -> None:
    maps, moment, weights = torch.randn(4, 6, 40, dtype=torch.float64), spd(40), spd(4, 6)
    down, up = low_rank(maps, moment, weights, 9)
    root = symmetric_root(weights)[0]
    singular = torch.linalg.svdvals((root @ maps).flatten(0, 1) @ symmetric_root(moment)[0])
    torch.testing.assert_close(weighted_error(maps, moment, weights, down, up), singular[9:].square().sum())
    torch.testing.assert_close(down.norm(dim=1), up.flatten(0, 1).norm(dim=0))


def test_cost_decides_what_is_kept() -> None:
    """With one direction left, the costlier of keys and values gets it."""
    k_nope, value, moment = (
        torch.randn(2, 3, 20, dtype=torch.float64),
        torch.randn(2, 3, 20, dtype=torch.float64),
        spd(20),
    )
    cheap, dear = (
        torch.eye(3, dtype=torch.float64).expand(2, -1, -1) * 1e-6,
        torch.eye(3, dtype=torch.float64).expand(2, -1, -1),
    )
    for key_cost, value_cost, kept in ((dear, cheap, k_nope), (cheap, dear, value)):
        down, up_key, up_value = joint_key_value(k_nope, value, moment, key_cost, value_cost, 6)
        up = up_key if kept is k_nope else up_value
        torch.testing.assert_close(up @ down, kept, rtol=1e-4, atol=1e-4)


def two_moment_error(k_nope, value, moments, costs, down, up_key, up_value) -> torch.Tensor:
    key = weighted_error(k_nope, moments[0], costs[0], down, up_key)
    return key + weighted_error(value, moments[1], costs[1], down, up_value)


def test_two_moments_that_are_equal_give_the_joint_optimum() -> None:
    k_nope, value = torch.randn(2, 2, 6, 20, dtype=torch.float64)
    moment, costs = spd(20), (spd(2, 6), spd(2, 6))
    best = joint_key_value(k_nope, value, moment, *costs, 7)
    found = joint_two_moments(k_nope, value, moment, moment, *costs, 7)
    errors = [two_moment_error(k_nope, value, (moment, moment), costs, *factors) for factors in (best, found)]
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-6, atol=0)


def test_two_moments_reach_a_stationary_point_below_the_start() -> None:
    k_nope, value = torch.randn(2, 2, 6, 20, dtype=torch.float64)
    moments, costs = (spd(20), spd(20)), (spd(2, 6), spd(2, 6))
    few, many = (joint_two_moments(k_nope, value, *moments, *costs, 7, sweeps=n) for n in (2, 400))
    start = joint_key_value(k_nope, value, sum(moments) / 2, *costs, 7)
    errors = [float(two_moment_error(k_nope, value, moments, costs, *factors)) for factors in (start, few, many)]
    assert errors[0] > errors[1] > errors[2]
    factors = [factor.clone().requires_grad_() for factor in many]
    two_moment_error(k_nope, value, moments, costs, *factors).backward()
    start = [factor.clone().requires_grad_() for factor in start]
    two_moment_error(k_nope, value, moments, costs, *start).backward()
    for factor, other in zip(factors, start, strict=True):
        assert factor.grad.norm() < 1e-2 * other.grad.norm()


def test_two_moments_at_full_rank_lose_nothing() -> None:
    k_nope, value = torch.randn(2, 2, 3, 20, dtype=torch.float64)
    down, up_key, up_value = joint_two_moments(k_nope, value, spd(20), spd(20), spd(2, 3), spd(2, 3), 12)
    torch.testing.assert_close(up_key @ down, k_nope)
    torch.testing.assert_close(up_value @ down, value)
