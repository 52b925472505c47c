"""Low rank of linear maps under a weighted error: keys and values together, and queries."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric_root(matrix: Tensor, floor: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of positive semidefinite matrices [..., n, n].

    Eigenvalues below `floor` times the largest are raised to it, so that the inverse exists.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values = torch.maximum(values, floor * values[..., -1:].clamp_min(1e-30))
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    return root, inverse


def low_rank(maps: Tensor, second_moment: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-R factors of stacked maps under a block-diagonal error weight.

    Minimises E|L (M x - up down x)|^2 with L = diag(weights)^{1/2}: the leading eigenvectors of L M C M^T L. Exact
    when R is at least the rank of M. Rows of `down` and columns of `up` have equal norms (balanced factors).

    Args:
        maps: [n, w, D], n blocks of w rows.
        second_moment: C = E[x x^T], [D, D].
        weights: [n, w, w], positive semidefinite, the cost of an error in a block.
        rank: R, at most n*w.

    Returns:
        down [R, D] and up [n, w, R].
    """
    blocks, width, _ = maps.shape
    root, inverse = symmetric_root(weights)
    weighted = (root @ maps).flatten(0, 1)
    gram = weighted @ second_moment @ weighted.mT
    basis = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :rank]
    down = basis.mT @ weighted
    up = inverse @ basis.unflatten(0, (blocks, width))
    balance = (up.flatten(0, 1).norm(dim=0) / down.norm(dim=1).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
    return down * balance[:, None], up / balance


def joint_key_value(
    k_nope: Tensor,
    value: Tensor,
    second_moment: Tensor,
    key_cost: Tensor,
    value_cost: Tensor,
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One latent for the keys without rotation and the values (DeepSeek-V2, arXiv:2405.04434, eq. 9 to 11).

    Args:
        k_nope, value: [G, d, D]. second_moment: [D, D]. key_cost, value_cost: [G, d, d].

    Returns:
        down [R, D], up of the keys [G, d, R], up of the values [G, d, R].
    """
    down, up = low_rank(
        torch.cat((k_nope, value)), second_moment, torch.cat((key_cost, value_cost)), rank
    )
    groups = len(k_nope)
    return down, up[:groups], up[groups:]


def norm_cost(maps: Tensor, second_moment: Tensor) -> Tensor:
    """Weights that give keys and values the same total energy, as TransMLA balances them: [G, d, d]."""
    energy = torch.einsum("gwx,xy,gwy->", maps, second_moment, maps) / maps.shape[0]
    identity = torch.eye(maps.shape[1], dtype=maps.dtype, device=maps.device)
    return (identity / energy.clamp_min(1e-30)).expand(maps.shape[0], -1, -1)
