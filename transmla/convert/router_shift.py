"""A router whose softmax DeepSeek's sigmoid stands for: all logits of a token shifted down, by a linear feature of it.

Mixtral weighs the k experts of the largest logits l by a softmax of these, which does not see a number that is added to
all logits of a token. DeepSeek-V3 weighs them by sigmoid(l) / (sum of sigmoids + 1e-20). Far below zero both are the
same, because sigmoid(l) = e^l (1 + O(e^l)). DeepSeek's router has no bias, so the shift is linear in the router's
input h, which stands behind a norm and points to one side: s(h) = depth · uᵀh + vᵀh, with u and v the regressions of 1
and of the largest logit on h. The largest logit less s is then near -depth, and the router's weight W becomes
W - 1 (depth · u + v)ᵀ.

The shift goes into the exported weight alone. In a student of 16 bits it would be rounded with the weight, for every
expert in another way, and the student's trunk would no longer be its teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Of each coordinate's mean square. It keeps u and v from resting on few coordinates, which an outlier has not and whose
# numbers lose most when the router is stored in 16 bits.
RIDGE = 1e-3

TINY = 1e-20  # what DeepSeek adds to the sum of the sigmoids

MOST = 1e-3  # mean relative error of a weight that a conversion takes

# How far below zero the largest logit is put. A weight's relative error is about e^-depth, plus 1e-20 e^depth: at 20
# both are 2e-9, and a token may miss by 6 on either side for 1e-6. In 16 bits a weight has an error of 2e-3 anyway, and
# the rounding of the router grows with the depth.
DEPTH = {torch.float64: 20.0, torch.float32: 20.0, torch.bfloat16: 10.0, torch.float16: 10.0}


@dataclass(frozen=True)
class RouterShift:
    """The shift of one layer. one: u, [D]. largest: v, [D]. Both float64."""

    one: Tensor
    largest: Tensor

    def at(self, dtype: torch.dtype) -> Tensor:
        """The row [D] that is taken off every expert's in a checkpoint of a number format."""
        return DEPTH[dtype] * self.one + self.largest


def sigmoid_weights(logits: Tensor) -> Tensor:
    """DeepSeek's weights of the chosen experts, [n, k], from their logits."""
    scores = logits.sigmoid()
    return scores / (scores.sum(-1, keepdim=True) + TINY)


def weight_errors(logits: Tensor, shift: Tensor, count: int) -> Tensor:
    """The largest relative error of a token's weights, [n], where sigmoids of shifted logits stand for the softmax.

    Args:
        logits: of all experts, [n, E]. shift: s, [n]. count: experts of a token.
    """
    chosen = logits.topk(count, dim=-1).values
    return (sigmoid_weights(chosen - shift[:, None]) / chosen.softmax(-1) - 1.0).abs().amax(-1)


def fit_shift(second: Tensor, mean: Tensor, cross: Tensor, largest: float) -> RouterShift:
    """The regressions of 1 and of the largest logit l on the router's input h, scaled such that their means are right.

    Args:
        second: E[h hᵀ], [D, D]. mean: E[h], [D]. cross: E[l h], [D]. largest: E[l].
    """
    square = second.diagonal()
    damping = RIDGE * square + 1e-12 * square.mean()  # a coordinate that is always zero has no square of its own
    one, follow = torch.linalg.solve(second + damping.diag(), torch.stack((mean, cross), dim=1)).unbind(1)
    one = one / (one @ mean).clamp_min(1e-30)
    return RouterShift(one, follow + (largest - follow @ mean) * one)
