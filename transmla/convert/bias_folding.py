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
logits. With ε = wᵀx - 1 and Δ the distance, a share α of the bias leaves e^{iΔω} (1 - α (1 + ε)), whose variance
under attention is (1 - α)² (1 - |E e^{iΔω}|²) + α² E ε². It is least at the α of `kept_share`.
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


def kept_share(distance: Tensor, frequencies: Tensor, error: Tensor) -> Tensor:
    """The share α of a rotating key's bias that is worth its error, by channel: s / (s + E ε²), with the spread
    s = 1 - |E e^{iΔω}|² as the mean over heads. 0 without rotation, where softmax does not see the bias; else near 1.

    Args:
        distance: [H, L], attention by distance. frequencies: ω, [N]. error: E ε², of the feature over attended tokens.

    Returns:
        [N].
    """
    spread = (1.0 - mean_rotation(distance, frequencies).abs().square()).mean(0).clamp_min(0.0)
    return spread / (spread + error).clamp_min(1e-30)


def fold_rotating_keys(keys: Tensor, frequencies: Tensor, statistics: LayerStatistics) -> Tensor:
    """Maps of the shared rotating key, [P, D1], without a bias. frequencies: of its channels, [P/2]."""
    moment, mean = statistics.attended, statistics.averaged_mean
    feature = constant_feature(moment, mean)
    error = (feature @ moment @ feature - 2.0 * feature @ mean + 1.0).clamp_min(0.0)
    share = kept_share(statistics.distance, frequencies, error).repeat(2)
    return fold(torch.cat((keys[:, :-1], share[:, None] * keys[:, -1:]), dim=1), feature)
