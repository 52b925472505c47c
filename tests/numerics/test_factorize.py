"""Weighted low rank against the Eckart-Young optimum."""

import torch

from transmla.convert.factorize import joint_key_value, low_rank, symmetric_root


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
    k_nope, value, moment = torch.randn(2, 3, 20, dtype=torch.float64), torch.randn(2, 3, 20, dtype=torch.float64), spd(20)
    cheap, dear = torch.eye(3, dtype=torch.float64).expand(2, -1, -1) * 1e-6, torch.eye(3, dtype=torch.float64).expand(2, -1, -1)
    for key_cost, value_cost, kept in ((dear, cheap, k_nope), (cheap, dear, value)):
        down, up_key, up_value = joint_key_value(k_nope, value, moment, key_cost, value_cost, 6)
        up = up_key if kept is k_nope else up_value
        torch.testing.assert_close(up @ down, kept, rtol=1e-4, atol=1e-4)
