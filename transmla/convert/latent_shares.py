"""The low-rank step for several latents: every latent is solved for its own key/value heads, as one is for all.

A source's G key/value heads are cut into n shares of G/n neighbours, its H query heads with them. An error of one share
costs what it costs whatever the others do, so that the joint optimum under the blocks is that of every block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.convert.low_rank import joint_key_value, joint_two_moments, norm_cost
from transmla.convert.tied import tied_key_value


@dataclass(frozen=True)
class Errors:
    """What errors of keys and values are weighed by.

    key_moment, value_moment: [D, D]; one object where one moment serves both. key_cost, value_cost: [G, d, d], or None:
    keys and values of a share get the same energy, `balance` on the keys' side.
    """

    key_moment: Tensor
    value_moment: Tensor
    key_cost: Tensor | None
    value_cost: Tensor | None
    balance: float = 1.0


@dataclass(frozen=True)
class Latent:
    """One latent c = down x [r] of G/n key/value heads: k_g = up_key_g c (tied: of its first half), v_g = up_value_g c.

    down: [r, D]. up_key: [G/n, d, r], tied [G/n, d, r/2]. up_value: [G/n, d, r].
    """

    down: Tensor
    up_key: Tensor
    up_value: Tensor


def solve_latents(
    k_nope: Tensor, value: Tensor, errors: Errors, *, rank: int, latents: int = 1, tied: bool = False
) -> list[Latent]:
    """The latents, in the order of their heads.

    Args:
        k_nope, value: [G, d, D]. rank: R, of all latents together. latents: n, a divisor of G and R.
    """
    count = len(k_nope) // latents
    shares = [slice(start, start + count) for start in range(0, len(k_nope), count)]
    return [_solve(k_nope[share], value[share], errors, share, rank // latents, tied=tied) for share in shares]


def _solve(k_nope: Tensor, value: Tensor, errors: Errors, share: slice, rank: int, *, tied: bool) -> Latent:
    one = errors.key_moment is errors.value_moment
    if errors.key_cost is None or errors.value_cost is None:
        key_cost = errors.balance * norm_cost(k_nope, errors.key_moment)
        value_cost = norm_cost(value, errors.value_moment)
    else:
        key_cost, value_cost = errors.key_cost[share], errors.value_cost[share]
    if tied:
        return Latent(
            *tied_key_value(k_nope, value, errors.key_moment, errors.value_moment, key_cost, value_cost, rank)
        )
    if one:
        return Latent(*joint_key_value(k_nope, value, errors.key_moment, key_cost, value_cost, rank))
    return Latent(*joint_two_moments(k_nope, value, errors.key_moment, errors.value_moment, key_cost, value_cost, rank))


def latent_bias(latent: Latent, value_bias: Tensor, value_cost: Tensor | None) -> Tensor:
    """The constant β [r] of a tied latent whose values come nearest to biased ones: Σ_g |L_g^{1/2}(U_g β - b_g)|² is
    least. Exact where the values' maps have full rank, as with one key/value head a latent of d.

    Args:
        value_bias: b, [G/n, d]. value_cost: L, [G/n, d, d]; None: the identity.
    """
    weighted = latent.up_value.mT if value_cost is None else latent.up_value.mT @ value_cost
    gram, target = (weighted @ latent.up_value).sum(0), (weighted @ value_bias[..., None]).sum(0)
    return (torch.linalg.pinv(gram, hermitian=True) @ target)[:, 0]
