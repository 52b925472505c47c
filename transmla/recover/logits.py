"""One chunk of logits: the sum of a loss and its derivative with respect to the student's uncapped logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from transmla.modeling.kernels.eager import cap
from transmla.recover.divergence import Divergence, value_and_slope, value_and_slope_of_kept


def logits_float32(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [n, D] times head [V, D] transposed, in float32.

    Products of bfloat16 operands are accumulated and returned in float32: logits rounded to bfloat16 would spoil the
    gradient, a difference of nearly equal numbers, when the two distributions are close. Hidden states of more digits
    than the head go in two parts, each bfloat16, so that none of those digits is lost either.
    """
    if hidden.is_cuda and head.dtype == torch.bfloat16:
        high = hidden.to(torch.bfloat16)
        logits = torch.mm(high, head.T, out_dtype=torch.float32)
        if hidden.dtype != torch.bfloat16:
            low = (hidden - high.to(hidden.dtype)).to(torch.bfloat16)
            logits += torch.mm(low, head.T, out_dtype=torch.float32)
        return logits
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide) @ head.to(wide).T


def dense(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence,
    share: float,
    softcap: float | None,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One chunk against the teacher's logits: sum and its derivative with respect to the uncapped logits.

    The temperature is a tensor, because a compiled function is compiled again for every new number; None is one.

    Args:
        student, teacher: uncapped logits [n, V]. labels: [n] or None. share: of the cross-entropy.
        products: dtype of the derivative, which is only ever a factor of products.
    """
    logits = cap(student, softcap)
    expected = cap(teacher, softcap)
    log_q = F.log_softmax(logits, -1) if temperature is None or labels is not None else None
    if temperature is None:
        assert log_q is not None
        value, slope = value_and_slope(log_q, F.log_softmax(expected, -1), divergence)
    else:
        log_p = F.log_softmax(expected / temperature, -1)
        value, slope = value_and_slope(F.log_softmax(logits / temperature, -1), log_p, divergence)
        # d/dlogits of T² D(softmax(logits / T)) is T times the slope.
        value, slope = value * temperature.square(), slope * temperature
    if labels is not None:
        assert log_q is not None
        value, slope = _mix(value, slope, log_q, labels, share)
    return value.sum(), _uncap(slope, logits, softcap).to(products)


def kept_part(
    student: Tensor,
    ids: Tensor,
    logp: Tensor,
    labels: Tensor | None,
    divergence: Divergence,
    share: float,
    softcap: float | None,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One chunk against the kept part of the teacher's distribution; otherwise as `dense`."""
    logits = cap(student, softcap)
    log_q = F.log_softmax(logits, -1)
    value, slope = value_and_slope_of_kept(log_q, ids, logp.to(logits.dtype), divergence)
    if labels is not None:
        value, slope = _mix(value, slope, log_q, labels, share)
    return value.sum(), _uncap(slope, logits, softcap).to(products)


def label_alone(student: Tensor, labels: Tensor, softcap: float | None, products: torch.dtype) -> tuple[Tensor, Tensor]:
    """One chunk of plain cross-entropy."""
    logits = cap(student, softcap)
    log_q = F.log_softmax(logits, -1)
    slope = _less_at(log_q.exp(), labels, torch.ones_like(log_q[:, 0]))
    return -log_q.gather(1, labels[:, None]).sum(), _uncap(slope, logits, softcap).to(products)


def _mix(value: Tensor, slope: Tensor, log_q: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A divergence [n] and its slope with a share of cross-entropy where the label is one, from the softmax that is
    there already."""
    part = share * (labels >= 0).to(value.dtype)
    labels = labels.clamp(min=0)
    other = -log_q.gather(1, labels[:, None])[:, 0]
    slope = _less_at((1.0 - part[:, None]) * slope + part[:, None] * log_q.exp(), labels, part)
    return (1.0 - part) * value + part * other, slope


def _less_at(slope: Tensor, labels: Tensor, amount: Tensor) -> Tensor:
    """slope [n, V] less `amount` [n] at every row's label [n]. Compiled, a comparison joins the pass that writes the
    slope, where a scatter would be a pass of its own; on a CPU it is the other way round."""
    if torch.compiler.is_compiling():
        return slope - amount[:, None] * (torch.arange(slope.shape[1], device=slope.device) == labels[:, None])
    return slope.scatter_add_(1, labels[:, None], -amount[:, None].to(slope.dtype))


def _uncap(slope: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    return slope if softcap is None else slope * (1.0 - (logits / softcap).square())


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def fast(function: Callable, logits: Tensor) -> Callable:
    """On a GPU the chunk's two dozen passes over its logits are fused into a few."""
    return compiled(function) if logits.is_cuda else function
