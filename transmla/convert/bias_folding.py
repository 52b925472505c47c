"""Projections without a bias: what the bias adds becomes a linear feature of the attention's input.

An engine whose DeepSeek class has no biases drops them without a word. With `w` the regression of the constant 1 on the
input x, a map W x + b becomes (W + b wᵀ) x, and its error is b (wᵀx - 1): a few percent of the bias, because inputs
behind a norm point to one side. Every map is asked on inputs of its own, and has a `w` of its own:

| map | is computed of | moments |
|---|---|---|
| queries | every token | E[x xᵀ], E[x] |
| rotating keys | tokens that are attended to | E[sum_s A_ts x_s x_sᵀ], E[sum_s A_ts x_s] |
| values | inputs as attention averages them, z_t = sum_s A_ts x_s | E[z zᵀ], E[z] |

The bias of a key without rotation is no matter of these: softmax does not see it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transmla.convert.calibration import LayerStatistics
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


def fold_rotating_keys(keys: Tensor, statistics: LayerStatistics) -> Tensor:
    """Maps of the shared rotating key, [P, D1], without a bias."""
    return fold(keys, constant_feature(statistics.attended, statistics.averaged_mean))
