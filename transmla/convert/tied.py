"""One latent whose first half makes the keys, and which as a whole makes the values (GTA, arXiv:2505.21523).

With T = [T1; T2] = W x the student's value is T and its key without rotation T1. Maps B_g and A_g that lead back to the
source's heads go into queries and output projection:  k_g ~ B_g T1  and  v_g ~ A_g T = A1_g T1 + A2_g T2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.convert.low_rank import joint_diagonal, joint_key_value, low_rank

Factors = tuple[Tensor, Tensor, Tensor]

DAMPING = 1e-10  # of a regression's mean eigenvalue


def tied_key_value(
    k_nope: Tensor,
    value: Tensor,
    key_moment: Tensor,
    value_moment: Tensor,
    key_cost: Tensor,
    value_cost: Tensor,
    rank: int,
    *,
    sweeps: int = 15,
) -> Factors:
    """Minimises  sum_g tr L_g (K_g - B_g W1) C_k (K_g - B_g W1)^T + tr L_g (V_g - A_g W) C_v (V_g - A_g W)^T.

    Both loops alternate exact solutions, so that the error never grows. The first one takes one moment for both: T1 is
    then the best joint latent of K and V - A2 T2, and T2 the best of V - A1 T1. The second one is for two moments.

    Args:
        k_nope, value: K and V, [G, d, D]. key_moment, value_moment: C_k and C_v, [D, D]; one object for one moment.
        key_cost, value_cost: L, [G, d, d]. rank: r, even. sweeps: of each loop.

    Returns:
        down W [r, D], maps of the keys B [G, d, r/2], maps of the values A [G, d, r]. Each half of W is in principal
        components.
    """
    one = key_moment is value_moment
    middle = value_moment if one else _middle(key_moment, value_moment)
    halves = (k_nope, value, middle, key_cost, value_cost, rank // 2)
    # T2 begins with nothing of the values, or with all: which end is lower depends on what keys and values cost.
    tried = [_halves(*halves, rest=rest, sweeps=sweeps) for rest in (value, torch.zeros_like(value))]
    factors = min(tried, key=lambda found: _error(found, k_nope, value, middle, key_cost, value_cost))
    if one or _exact(factors[0], k_nope, value):
        return factors
    whole = _alternate(factors[0], k_nope, value, key_moment, value_moment, key_cost, value_cost, sweeps)
    half = rank // 2
    up_key, up_value = _regress(k_nope, key_moment, whole[:half]), _regress(value, value_moment, whole)
    # The same maps in principal components: an arbitrary basis of the latent is hard to train from.
    first, second = up_value[..., :half] @ whole[:half], up_value[..., half:] @ whole[half:]
    down, up_key, up_first = joint_key_value(up_key @ whole[:half], first, middle, key_cost, value_cost, half)
    below, up_second = low_rank(second, middle, value_cost, half)
    return torch.cat((down, below)), up_key, torch.cat((up_first, up_second), dim=-1)


def _halves(
    k_nope: Tensor,
    value: Tensor,
    moment: Tensor,
    key_cost: Tensor,
    value_cost: Tensor,
    half: int,
    *,
    rest: Tensor,
    sweeps: int,
) -> Factors:
    """The first loop. rest: of the values, what T2 does not make."""
    for _ in range(sweeps):
        down, up_key, up_first = joint_key_value(k_nope, rest, moment, key_cost, value_cost, half)
        below, up_second = low_rank(value - up_first @ down, moment, value_cost, half)
        rest = value - up_second @ below
    return torch.cat((down, below)), up_key, torch.cat((up_first, up_second), dim=-1)


def _error(
    factors: Factors, k_nope: Tensor, value: Tensor, moment: Tensor, key_cost: Tensor, value_cost: Tensor
) -> float:
    down, up_key, up_value = factors
    lost = k_nope - up_key @ down[: up_key.shape[-1]], value - up_value @ down
    costs = (key_cost, value_cost)
    return sum(float((cost @ rest * (rest @ moment)).sum()) for cost, rest in zip(costs, lost, strict=True))


def _middle(key_moment: Tensor, value_moment: Tensor) -> Tensor:
    """Both moments, of the same mean."""
    level = value_moment.diagonal().mean() / key_moment.diagonal().mean().clamp_min(1e-30)
    return (level * key_moment + value_moment) / 2


def _exact(down: Tensor, k_nope: Tensor, value: Tensor) -> bool:
    """Whether nothing is lost: each half has the rank of the keys, and of the values."""
    return len(down) // 2 >= min(k_nope.shape[0] * k_nope.shape[1], value.shape[0] * value.shape[1], down.shape[1])


def _regress(maps: Tensor, moment: Tensor, down: Tensor) -> Tensor:
    """The U [G, d, r] for which U W is nearest to maps [G, d, D]."""
    seen = moment @ down.mT
    gram = down @ seen
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, (maps @ seen).flatten(0, 1).mT).mT.unflatten(0, maps.shape[:2])


def _alternate(
    down: Tensor,
    k_nope: Tensor,
    value: Tensor,
    key_moment: Tensor,
    value_moment: Tensor,
    key_cost: Tensor,
    value_cost: Tensor,
    sweeps: int,
) -> Tensor:
    """A better W [r, D], from a given one.

    Given the maps, the gradient vanishes where  A_k W C_k + A_v W C_v = B  (transmla.convert.low_rank); A_k is zero
    but for its first half. Simultaneous diagonalisation of (C_k, C_v) and of (A_k + A_v, A_v) makes it a division.
    """
    half = len(down) // 2
    inputs, ratio = joint_diagonal(key_moment, value_moment)
    for _ in range(sweeps):
        up_key, up_value = _regress(k_nope, key_moment, down[:half]), _regress(value, value_moment, down)
        costly_key, costly_value = up_key.mT @ key_cost, up_value.mT @ value_cost  # [G, r/2, d], [G, r, d]
        value_gram = (costly_value @ up_value).sum(0)
        target = (costly_value @ value).sum(0) @ value_moment
        target[:half] += (costly_key @ k_nope).sum(0) @ key_moment
        both = value_gram.clone()
        both[:half, :half] += (costly_key @ up_key).sum(0)
        latent, share = joint_diagonal(both, value_gram)  # V^T both V = I, V^T A_v V = diag(share)
        weight = (1.0 - share)[:, None] + share[:, None] * ratio[None, :]
        down = latent @ ((latent.mT @ target @ inputs) / weight.clamp_min(1e-12)) @ inputs.mT
    return down
