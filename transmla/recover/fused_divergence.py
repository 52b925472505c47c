"""Value and slope of a divergence from two models' logits, in one Triton kernel.

A program has a row. It passes over the logits once for both normalisers and the sums that the value needs (the
Jensen-Shannon divergence: twice), and once more to write the slope over what it has read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transmla.recover.divergence import Divergence

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
BLOCK, WARPS = 4096, 16  # logits at a time; the fastest on an H100 (docs/experiments.md)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _read(TEACHER, STUDENT, word, words, cap, scale, GAP: tl.constexpr, CAPPED: tl.constexpr):
    """A block's logits of student (capped only), student and teacher (capped and divided by the temperature)."""
    there = word < words
    zt = tl.load(TEACHER + word, mask=there, other=0.0).to(tl.float32)
    zs = tl.load(STUDENT + word, mask=there, other=0.0).to(tl.float32)
    if GAP:
        zs = zt + zs
    if CAPPED:
        zt, zs = cap * _tanh(zt / cap), cap * _tanh(zs / cap)
    # Masked last: a mask that is scaled may be contracted with what is taken off it, to something other than zero.
    warm_s, warm_t = tl.where(there, zs * scale, -1e30), tl.where(there, zt * scale, -1e30)
    return there, tl.where(there, zs, -1e30), warm_s, warm_t


@triton.jit
def _add(most, total, logits):
    """Running maximum and sum of exponentials, lane by lane; also the weights of the new logits and of the old sums."""
    new = tl.maximum(most, logits)
    old, weight = tl.exp(most - new), tl.exp(logits - new)
    return new, total * old + weight, old, weight


@triton.jit
def _log_sum(most, total):
    """Logarithm of the sum of exponentials over all lanes, and each lane's share of it by its own maximum."""
    top = tl.max(most, 0)
    share = tl.exp(most - top)
    return top + tl.log(tl.sum(total * share, 0)), share


@triton.jit
def _divergence(
    TEACHER,
    STUDENT,
    SLOPE,
    VALUE,
    LABEL,
    words,
    teacher_stride,
    student_stride,
    slope_stride,
    temperature,
    cap,
    beta,
    share,
    KIND: tl.constexpr,
    GAP: tl.constexpr,
    CAPPED: tl.constexpr,
    WARM: tl.constexpr,
    LABELLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    TEACHER += row * teacher_stride
    STUDENT += row * student_stride
    SLOPE += row * slope_stride
    lane = tl.arange(0, BLOCK)
    scale = 1.0 / temperature
    label = row
    if LABELLED:
        label = tl.load(LABEL + row)
    most_t = tl.full([BLOCK], -1e30, tl.float32)
    most_s, most_1 = most_t, most_t
    sum_t = tl.zeros([BLOCK], tl.float32)
    sum_s, sum_1, gaps, at_label = sum_t, sum_t, sum_t, sum_t
    for start in range(0, words, BLOCK):
        word = start + lane
        there, plain, zs, zt = _read(TEACHER, STUDENT, word, words, cap, scale, GAP, CAPPED)
        gap = tl.where(there, zs - zt, 0.0)
        most_t, sum_t, old_t, weight_t = _add(most_t, sum_t, zt)
        most_s, sum_s, old_s, weight_s = _add(most_s, sum_s, zs)
        gaps = gaps * old_t + weight_t * gap if KIND == 0 else gaps * old_s + weight_s * gap
        if LABELLED:
            at_label += tl.where(word == label, plain, 0.0)
            if WARM:
                most_1, sum_1, old_1, weight_1 = _add(most_1, sum_1, plain)
    log_t, share_t = _log_sum(most_t, sum_t)
    log_s, share_s = _log_sum(most_s, sum_s)
    shift = log_s - log_t
    if KIND == 0:
        value = shift - tl.sum(gaps * share_t, 0) / tl.sum(sum_t * share_t, 0)
    else:
        value = tl.sum(gaps * share_s, 0) / tl.sum(sum_s * share_s, 0) - shift
    against = 0.0
    if KIND == 2:
        own = tl.zeros([BLOCK], tl.float32)
        other = tl.zeros([BLOCK], tl.float32)
        for start in range(0, words, BLOCK):
            there, plain, zs, zt = _read(TEACHER, STUDENT, start + lane, words, cap, scale, GAP, CAPPED)
            # log(q/m) and log(p/m) from log(p/q) alone: both are small where the models agree. Beyond e^80 one is zero.
            ratio = tl.minimum(tl.maximum(shift - tl.where(there, zs - zt, 0.0), -80.0), 80.0)
            own += tl.exp(zs - log_s) * -tl.log(1.0 + beta * (tl.exp(ratio) - 1.0))
            other += tl.exp(zt - log_t) * tl.log(1.0 + (1.0 - beta) * (tl.exp(-ratio) - 1.0))
        against = tl.sum(own, 0)
        value = (1.0 - beta) * against - beta * tl.sum(other, 0)
    kept, log_1, part = value, log_s, 0.0
    if WARM:
        kept = value * temperature * temperature
    if LABELLED:
        part = tl.where(label >= 0, share, 0.0)
        if WARM:
            log_1, share_1 = _log_sum(most_1, sum_1)
        kept = (1.0 - part) * kept + part * (log_1 - tl.sum(at_label, 0))
    tl.store(VALUE + row, kept)
    for start in range(0, words, BLOCK):
        word = start + lane
        there, plain, zs, zt = _read(TEACHER, STUDENT, word, words, cap, scale, GAP, CAPPED)
        q = tl.exp(zs - log_s)
        if KIND == 0:
            slope = q - tl.exp(zt - log_t)
        elif KIND == 1:
            slope = q * (zs - zt - shift - value)
        else:
            ratio = tl.minimum(tl.maximum(shift - (zs - zt), -80.0), 80.0)
            slope = (1.0 - beta) * q * (-tl.log(1.0 + beta * (tl.exp(ratio) - 1.0)) - against)
        if WARM:
            slope = slope * temperature
        if LABELLED:
            if WARM:
                q = tl.exp(plain - log_1)
            slope = (1.0 - part) * slope + part * (q - tl.where(word == label, 1.0, 0.0))
        if CAPPED:
            slope = slope * (1.0 - (plain / cap) * (plain / cap))
        tl.store(SLOPE + word, slope.to(SLOPE.dtype.element_ty), mask=there)


def value_and_slope_of_logits(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    *,
    gap: bool,
    temperature: float,
    labels: Tensor | None,
    share: float,
    softcap: float | None,
    products: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of one chunk's loss and its derivative with respect to the student's uncapped logits.

    Args:
        student: uncapped logits [n, V], or with `gap` what they have more than the teacher's; on a GPU, used up.
        teacher: uncapped logits [n, V].
        labels: [n], negative where only the divergence counts, or None. share: of the cross-entropy.
        softcap: cap on both models' logits, or None.
        products: dtype of the slope, at most as wide as that of `student`.
        out: where the slope goes, [n, V]; None: into the memory of `student`.

    Returns:
        scalar; slope [n, V].
    """
    rows, words = student.shape
    slope = out
    if slope is None:
        slope = student if student.dtype == products else student.view(products)[:, :words]
    value = torch.empty(rows, device=student.device)
    kernel: Any = _divergence
    kernel[(rows,)](
        teacher,
        student,
        slope,
        value,
        value if labels is None else labels,
        words,
        teacher.stride(0),
        student.stride(0),
        slope.stride(0),
        temperature,
        1.0 if softcap is None else softcap,
        divergence.beta,
        share,
        KIND=KINDS[divergence.kind],
        GAP=gap,
        CAPPED=softcap is not None,
        WARM=temperature != 1.0,
        LABELLED=labels is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return value.sum(), slope
