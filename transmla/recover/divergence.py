"""Divergences between two distributions over the same outcomes: value and slope, row by row.

Everything is written out in log-probabilities [n, V], so that nothing overflows and no autograd graph is kept. The
slope is the derivative with respect to the student's logits, that is, it sums to zero over a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EMPTY = -50.0  # log-probability of a rest with nothing in it


@dataclass(frozen=True)
class Divergence:
    """Which divergence of teacher p and student q a stage minimises.

    kind: `forward_kl` KL(p ‖ q), covers what the teacher may say; `reverse_kl` KL(q ‖ p), avoids what it would not;
        `jsd` β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q (Agarwal et al., arXiv:2306.13649, section 2).
    beta: β of jsd, in (0, 1).
    """

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.kind == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta of jsd must be between 0 and 1, got {self.beta}; its ends are forward_kl and reverse_kl"
            )


def value_and_slope(log_q: Tensor, log_p: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Divergence of every row and its derivative with respect to the student's logits.

    Args:
        log_q: log-probabilities of the student, [n, V], all finite. log_p: of the teacher.

    Returns:
        value [n] in nats, slope [n, V].
    """
    q, p = log_q.exp(), log_p.exp()
    if divergence.kind == "forward_kl":
        return torch.sub(log_p, log_q).mul_(p).sum(-1), q.sub_(p)  # in place: on a CPU every pass over n·V counts
    if divergence.kind == "reverse_kl":
        ratio = log_q - log_p
        value = (q * ratio).sum(-1)
        return value, ratio.sub_(value[:, None]).mul_(q)
    # log(q/m) and log(p/m) from log(p/q) alone: both are small where the models agree. Beyond e^80 one side is zero.
    beta, gap = divergence.beta, (log_p - log_q).clamp_(-80.0, 80.0)
    student = -torch.log1p(beta * torch.expm1(gap))
    against = (q * student).sum(-1)
    value = (1.0 - beta) * against - beta * (p * torch.log1p((1.0 - beta) * torch.expm1(-gap))).sum(-1)
    return value, (1.0 - beta) * q * (student - against[:, None])


def value_and_slope_of_kept(log_q: Tensor, ids: Tensor, log_p: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """The same where of the teacher only the largest probabilities are known: k outcomes and one for all the rest.

    By the data processing inequality this is a lower bound of the whole divergence, and equal to it at k = V.

    Args:
        log_q: [n, V]. ids: outcomes that are known, [n, k], different ones in a row. log_p: the teacher's
            log-probabilities of them, [n, k]; what is missing to one is the rest's.

    Returns:
        value [n], slope [n, V].
    """
    outside = log_q.scatter(1, ids, -torch.inf)
    rest = outside.logsumexp(-1, keepdim=True)
    known = log_p.double().exp().sum(-1, keepdim=True)  # 1 - it has few digits left in float32
    log_rest = torch.log((1.0 - known).clamp_min(0.0)).clamp_min(EMPTY).to(log_p.dtype)
    value, slope = value_and_slope(
        torch.cat((log_q.gather(1, ids), rest.clamp_min(EMPTY)), 1), torch.cat((log_p, log_rest), 1), divergence
    )
    # Outcomes of the rest share its slope in proportion to their probability.
    share = (outside - rest).exp().nan_to_num_(0.0)  # k = V leaves no rest
    return value, (share * slope[:, -1:]).scatter_(1, ids, slope[:, :-1])
