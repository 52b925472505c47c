"""Projections without a bias: what the bias adds becomes a linear feature of the attention's input.

An engine whose DeepSeek class has no biases drops them without a word. With `w` the regression of the constant 1 on the
input x, a map W x + b becomes (W + b wᵀ) x, and its error is b (wᵀx - 1): a few percent of the bias, because inputs
behind a norm point to one side. Every map is asked on inputs of its own, and has a `w` of its own:

| map | is computed of | moments |
|---|---|---|
| queries | every token | E[x xᵀ], E[x] |
| rotating keys | tokens that are attended to | E[sum_s A_ts x_s x_sᵀ], E[sum_s A_ts x_s] |
| values | inputs as attention averages them, z_t = sum_s A_ts x_s | E[z zᵀ], E[z] |

The bias of a key without rotation is no matter of these: softmax does not see it. It hardly sees that of a channel that
turns slowly either, where the biases of Qwen2 are hundreds of times the keys: a few percent of those would drown all
logits. So a rotating key does not get b wᵀ but β wᵀ, with the β that queries see least of (`seen_bias`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transmla.convert.calibration import LayerStatistics
from transmla.convert.rope import mean_rotation
from transmla.families.family import SourceAttention

RIDGE = 1e-5  # of the mean eigenvalue


def constant_feature(moment: Tensor, mean: Tensor) -> Tensor:
    """The w that makes E(wᵀx - 1)² smallest, ridge added.

    Args:
        moment: E[x xᵀ], [D, D]. mean: E[x], [D].

    Returns:
        [D].
    """
    damping = RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve(moment + damping, mean)


def fold(maps: Tensor, feature: Tensor) -> Tensor:
    """Maps [..., D1] whose last column, the bias, has gone into the others. feature: [D]."""
    folded = maps.clone()
    folded[..., :-1] += maps[..., -1:] * feature
    folded[..., -1] = 0.0
    return folded


def fold_queries_and_values(source: SourceAttention, statistics: LayerStatistics) -> SourceAttention:
    """The source's attention with queries and values without a bias; its keys are left as they are."""
    each = constant_feature(statistics.second_moment, statistics.mean)
    averaged = constant_feature(statistics.averaged, statistics.averaged_mean)
    return replace(source, query=fold(source.query, each), value=fold(source.value, averaged))


def turned_moments(queries: Tensor, distance: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """N and M, sums over heads of E[u uᵀ] and of E_q[E_Δ[u] E_Δ[u]ᵀ], for queries u = R_Δ q turned by their distance Δ.

    With z the complex form of q, turning multiplies E[z_m conj(z_n)] by e^{iΔ(ω_m - ω_n)} and E[z_m z_n] by
    e^{iΔ(ω_m + ω_n)}, whose means are values of one characteristic function.

    Args:
        queries: E[q qᵀ], [H, P, P], pairs (m, m + P/2). distance: [H, L], attention by distance. frequencies: [P/2].

    Returns:
        [P, P] each.
    """
    eye = torch.eye(len(frequencies), dtype=torch.complex128, device=queries.device)
    to_pairs = torch.cat((eye, 1j * eye), dim=1)
    moment, pseudo = (to_pairs @ queries.to(eye) @ other for other in (to_pairs.mH, to_pairs.mT))

    def turn(omega: Tensor) -> Tensor:
        return mean_rotation(distance, omega.flatten()).conj().unflatten(1, omega.shape)

    def to_real(same: Tensor, other: Tensor) -> Tensor:
        """E[u uᵀ] from E[z z^H] and E[z zᵀ], [H, N, N] each."""
        upper = torch.cat(((same + other).real, (other - same).imag), dim=-1)
        lower = torch.cat(((other + same).imag, (same - other).real), dim=-1)
        return torch.cat((upper, lower), dim=-2).sum(0) / 2

    rows, columns, each = frequencies[:, None], frequencies[None], turn(frequencies)
    whole = to_real(moment * turn(rows - columns), pseudo * turn(rows + columns))
    mean = to_real(
        moment * each[:, :, None] * each[:, None].conj(),
        pseudo * each[:, :, None] * each[:, None],
    )
    return whole, mean


def seen_bias(bias: Tensor, error: Tensor, whole: Tensor, mean: Tensor) -> Tensor:
    """The β for which a rotating key's β wᵀx stands best for its bias b, [P].

    A query sees uᵀ(b - β wᵀx), less its mean over the tokens that it attends to. With x independent of distance and
    query, the variance is least where (S + E ε² M) β = S b, ε = wᵀx - 1, S = N - M. Nothing of b is left without
    rotation, where S = 0; all of it where E ε² = 0.

    Args:
        bias: b, [P]. error: E ε² over attended tokens. whole, mean: N and M of `turned_moments`.
    """
    spread = whole - mean
    level = 1e-9 * whole.diagonal().mean().clamp_min(1e-30)  # directions that no query has are left out
    damping = level * torch.eye(len(bias), dtype=bias.dtype, device=bias.device)
    return torch.linalg.solve(spread + error * mean + damping, spread @ bias)


def fold_rotating_keys(keys: Tensor, queries: Tensor, frequencies: Tensor, statistics: LayerStatistics) -> Tensor:
    """Maps of the shared rotating key, [P, D1], without a bias.

    Args:
        queries: E[q qᵀ] of the rope head's queries, [H, P, P], by what an error of a logit costs. frequencies: of its
            channels, [P/2].
    """
    moment, mean = statistics.attended, statistics.averaged_mean
    feature = constant_feature(moment, mean)
    error = (feature @ moment @ feature - 2.0 * feature @ mean + 1.0).clamp_min(0.0)
    bias = seen_bias(keys[:, -1], error, *turned_moments(queries, statistics.distance, frequencies))
    return fold(torch.cat((keys[:, :-1], bias[:, None]), dim=1), feature)
