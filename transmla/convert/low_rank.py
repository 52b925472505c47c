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
    down, up = low_rank(torch.cat((k_nope, value)), second_moment, torch.cat((key_cost, value_cost)), rank)
    groups = len(k_nope)
    return down, up[:groups], up[groups:]


def joint_diagonal(first: Tensor, second: Tensor, floor: float = 1e-8) -> tuple[Tensor, Tensor]:
    """V and λ with V^T first V = I and V^T second V = diag(λ), for positive semidefinite [n, n].

    Eigenvalues of `first` below `floor` times the largest are raised to it.
    """
    values, vectors = torch.linalg.eigh((first + first.mT) / 2)
    whiten = vectors * values.clamp_min(floor * float(values[-1].clamp_min(1e-30))).rsqrt()
    inner = whiten.mT @ second @ whiten
    ratios, rotation = torch.linalg.eigh((inner + inner.mT) / 2)
    return whiten @ rotation, ratios.clamp_min(0.0)


def joint_two_moments(
    k_nope: Tensor,
    value: Tensor,
    key_moment: Tensor,
    value_moment: Tensor,
    key_cost: Tensor,
    value_cost: Tensor,
    rank: int,
    *,
    sweeps: int = 15,
) -> tuple[Tensor, Tensor, Tensor]:
    """One latent for keys and values whose errors are weighed by different second moments.

    Minimises  sum_g tr L_g (K_g - U_g W) C_k (K_g - U_g W)^T + the same for values with C_v  by alternating exact
    solutions from the one-moment optimum. Given W, every U is a regression. Given all U, the gradient vanishes where
    A_k W C_k + A_v W C_v = B  (A = sum_g U_g^T L_g U_g), which simultaneous diagonalisation of (C_k, C_v) and of
    (A_v, A_k) turns into a division entry by entry.

    Args:
        k_nope, value: K and V, [G, d, D]. key_moment, value_moment: C_k and C_v, [D, D].
        key_cost, value_cost: L, [G, d, d]. sweeps: of the alternation, each O(D² R).

    Returns:
        down W [R, D], up of the keys [G, d, R], up of the values [G, d, R].
    """
    level = value_moment.diagonal().mean() / key_moment.diagonal().mean().clamp_min(1e-30)
    middle = (level * key_moment + value_moment) / 2
    down, up_key, up_value = joint_key_value(k_nope, value, middle, key_cost, value_cost, rank)
    if rank >= min(k_nope.shape[:2].numel() + value.shape[:2].numel(), k_nope.shape[2]):
        return down, up_key, up_value  # nothing is lost
    inputs, ratio = joint_diagonal(key_moment, value_moment)

    def regress(maps: Tensor, moment: Tensor) -> Tensor:
        seen = moment @ down.mT  # [D, R]
        gram = down @ seen
        gram = gram + 1e-9 * gram.diagonal().mean() * torch.eye(rank, dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram, (maps @ seen).flatten(0, 1).mT).mT.unflatten(0, maps.shape[:2])

    for _ in range(sweeps):
        up_key, up_value = regress(k_nope, key_moment), regress(value, value_moment)
        costly_key, costly_value = up_key.mT @ key_cost, up_value.mT @ value_cost  # [G, R, d]
        key_gram, value_gram = (costly_key @ up_key).sum(0), (costly_value @ up_value).sum(0)
        target = (costly_key @ k_nope).sum(0) @ key_moment + (costly_value @ value).sum(0) @ value_moment
        # V^T (key + ε value) V = I, V^T value V = diag(share)
        latent, share = joint_diagonal(key_gram + 1e-9 * value_gram, value_gram)
        solved = (latent.mT @ target @ inputs) / (1.0 + share[:, None] * ratio[None, :])
        down = latent @ solved @ inputs.mT
    up_key, up_value = regress(k_nope, key_moment), regress(value, value_moment)
    # The same maps, of rank R, in principal components: an arbitrary basis of the latent is hard to train from.
    return joint_key_value(up_key @ down, up_value @ down, middle, key_cost, value_cost, rank)


def norm_cost(maps: Tensor, second_moment: Tensor) -> Tensor:
    """Weights that give keys and values the same total energy, as TransMLA balances them: [G, d, d]."""
    energy = torch.einsum("gwx,xy,gwy->", maps, second_moment, maps) / maps.shape[0]
    identity = torch.eye(maps.shape[1], dtype=maps.dtype, device=maps.device)
    return (identity / energy.clamp_min(1e-30)).expand(maps.shape[0], -1, -1)
