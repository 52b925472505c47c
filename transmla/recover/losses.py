"""Losses on next tokens, from hidden states, in chunks over tokens.

No tensor of T×V numbers is ever whole: a chunk of logits exists, gives its share of the loss and of the gradients with
respect to the student's hidden states and head, and is gone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from transmla.recover.divergence import Divergence
from transmla.recover.logits import dense, fast, kept_part, label_alone, logits_float32

ELEMENTS = 2**25  # logits of one model that exist at a time: 128 MiB in float32

SLOPES = 2**27  # derivatives kept for one product with the hidden states: 256 MiB in bfloat16

ROWS = 2**13  # rows of the head whose gradient is formed at a time
# Where one kernel makes value and slope of two models' logits, fewer and larger chunks pay: their bytes, 0.6 GiB, of
# which a trained head's slopes need a part, kept for few large products with the hidden states (docs/experiments.md). A
# chunk's tokens are a multiple of what matrix products on a GPU are cut into.
FUSED_BYTES, TRAINED_BYTES, TRAINED_SLOPES, TILE = 5 * 2**27, 7 * 2**26, 21 * 2**24, 128


@dataclass(frozen=True)
class Teacher:
    """What the teacher says about n tokens: hidden states after its last norm [n, D] and its head [V, D]."""

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class Kept:
    """What was kept of the teacher's distribution: log-probabilities of k tokens, ids and logp [n, k]."""

    ids: Tensor
    logp: Tensor


@dataclass(frozen=True)
class Mixture:
    """(1 - cross_entropy) · T² · divergence at temperature T + cross_entropy · cross-entropy of the next token.

    A token whose label is negative has the divergence alone, whole. T² keeps gradients of one size (Hinton et al.,
    arXiv:1503.02531, section 2.1).
    """

    divergence: Divergence = Divergence()
    temperature: float = 1.0
    cross_entropy: float = 0.0


def _accumulate(total: Tensor, slopes: Tensor, hidden: Tensor, *, first: bool) -> None:
    """Add slopesᵀ · hidden ([n, V] and [n, D]) to the head's gradient [V, D], which is as large as a head of float32.

    first: nothing was added yet, and what stands in the first V rows is not read.

    Accumulating per chunk would rewrite the whole gradient for a few hundred tokens; one product over all tokens would
    need their slopes, or a second copy of it.
    """
    hidden = hidden.to(slopes.dtype)
    narrow = slopes.is_cuda and slopes.dtype == torch.bfloat16
    if narrow:
        own = total[: slopes.shape[1]]
        if first:
            torch.mm(slopes.T, hidden, out_dtype=torch.float32, out=own)
        else:
            torch.addmm(own, slopes.T, hidden, out_dtype=torch.float32, out=own)
        return
    for start in range(0, slopes.shape[1], ROWS):
        rows = slopes[:, start : start + ROWS].T
        part, own = rows @ hidden, total[start : start + rows.shape[0]]
        own.copy_(part) if first else own.add_(part)


def _has_kernel(states: Tensor) -> bool:
    """Whether one kernel makes value and slope of two models' logits: on a GPU with Triton."""
    return states.is_cuda and find_spec("triton") is not None


def _fused_chunk(words: int, *, shared: bool, trained: bool) -> int:
    """Tokens whose logits exist at a time: float32 of both models, or of the teacher and bfloat16 of the difference."""
    most = max(1, (TRAINED_BYTES if trained else FUSED_BYTES) // (words * (6 if shared else 8)))
    return most if most < TILE else most // TILE * TILE


def _fused(
    logits: Tensor,
    expected: Tensor,
    labels: Tensor | None,
    mixture: Mixture,
    softcap: float | None,
    products: torch.dtype,
    out: Tensor | None,
    *,
    gap: bool,
) -> tuple[Tensor, Tensor]:
    """As `dense`, by the kernel, which uses the student's logits up; with `gap` they are what they have more than the
    teacher's."""
    from transmla.recover.fused_divergence import value_and_slope_of_logits

    return value_and_slope_of_logits(
        logits,
        expected,
        mixture.divergence,
        gap=gap,
        temperature=mixture.temperature,
        labels=labels,
        share=mixture.cross_entropy,
        softcap=softcap,
        products=products,
        out=out,
    )


def _in_products(head: Tensor, products: torch.dtype, *, trained: bool) -> AbstractContextManager[Tensor]:
    """The head [V, D] in the dtype of products; one that is trained in float32 without a copy, where a kernel can."""
    if trained and products == torch.bfloat16 and _has_kernel(head):
        from transmla.recover.rounded_head import can_be_rounded, rounded_in_place

        if can_be_rounded(head):
            return rounded_in_place(head)
    return nullcontext(head.to(products))


def _in_chunks(
    student: Tensor,
    head: Tensor,
    teacher: Teacher | Kept | None,
    labels: Tensor | None,
    mixture: Mixture,
    softcap: float | None,
    chunk: int | None,
    grad_hidden: Tensor | None,
    grad_head: Tensor | None,
    *,
    shared: bool,
) -> Tensor:
    """The loss, summed, and its gradients where they are wanted, written over `grad_hidden` and the first V rows of
    `grad_head`.

    Args:
        head: of the student, [V, D], in the dtype of products. shared: whether it is the teacher's too.
    """
    products, words = head.dtype, len(head)
    wide = torch.promote_types(student.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=student.device)
    plain = mixture.temperature == 1.0
    temperature = None if plain else torch.tensor(mixture.temperature, dtype=wide, device=student.device)
    rest = (mixture.divergence, mixture.cross_entropy, softcap, products)
    fused = isinstance(teacher, Teacher) and _has_kernel(student)
    trained = grad_head is not None
    chunk = chunk or (_fused_chunk(words, shared=shared, trained=trained) if fused else max(1, ELEMENTS // words))
    # Tokens of one product for the gradients through slopes that are kept.
    together = min(len(student), max(1, (TRAINED_SLOPES if fused else SLOPES) // words // chunk) * chunk)
    slopes = None
    if trained:
        slopes = student.new_empty(together, words, dtype=products if student.is_cuda else wide)
    for start in range(0, len(student), chunk):
        part = slice(start, start + chunk)
        if shared:
            assert isinstance(teacher, Teacher)
            logits = ((student[part] - teacher.hidden[part]).to(products)) @ head.T
        else:
            logits = logits_float32(student[part], head)
        target = None if labels is None else labels[part]
        if teacher is None:
            value, slope = fast(label_alone, logits)(logits, target, softcap, products)
        elif isinstance(teacher, Kept):
            value, slope = fast(kept_part, logits)(logits, teacher.ids[part], teacher.logp[part], target, *rest)
        else:
            expected = logits_float32(teacher.hidden[part], teacher.head[:words])
            if fused:
                done = start % together
                out = None if slopes is None else slopes[done : done + len(logits)]
                value, slope = _fused(logits, expected, target, mixture, softcap, products, out, gap=shared)
            else:
                value, slope = fast(dense, logits)(logits, expected, temperature, target, *rest)
            del expected
        del logits
        total += value
        if grad_hidden is not None and not (trained and fused):
            grad_hidden[part] = (slope @ head).to(student.dtype)
        if slopes is not None and grad_head is not None:
            done = start % together + len(slope)
            if not fused:
                slopes[done - len(slope) : done] = slope
            if done == together or start + chunk >= len(student):
                group = slice(start + len(slope) - done, start + len(slope))
                if grad_hidden is not None and fused:
                    grad_hidden[group] = (slopes[:done] @ head).to(student.dtype)
                _accumulate(grad_head, slopes[:done], student[group], first=group.start == 0)
        del slope  # before the next chunk's logits are made
    return total


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, student_head, teacher, labels, mixture, softcap, chunk, products):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        wide = torch.promote_types(student.dtype, torch.float32)
        words = len(student_head) if not isinstance(teacher, Teacher) else min(len(student_head), len(teacher.head))
        grad_hidden = torch.empty_like(student) if need_hidden else None
        grad_head = None
        if need_head:
            grad_head = torch.empty_like(student_head, dtype=wide)
            grad_head[words if len(student) else 0 :] = 0
        # One product of the difference of the states has the digits that two products would lose in theirs.
        shared = isinstance(teacher, Teacher) and teacher.head.data_ptr() == student_head.data_ptr()
        shared = shared and products == torch.bfloat16 and _has_kernel(student)
        with _in_products(student_head[:words], products, trained=need_head and not shared) as head:
            total = _in_chunks(
                student, head, teacher, labels, mixture, softcap, chunk, grad_hidden, grad_head, shared=shared
            )
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = student_head.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else grad_head.mul_(grad).to(ctx.head_dtype),
            *[None] * 6,
        )


def token_loss(
    student: Tensor,
    student_head: Tensor,
    teacher: Teacher | Kept | None,
    *,
    labels: Tensor | None = None,
    mixture: Mixture = Mixture(),
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens of the loss between student and teacher, or of plain cross-entropy without a teacher.

    Gradients flow to the student's hidden states and head only, and once. Vocabularies of different size are cut to
    the smaller one.

    Args:
        student: hidden states after the last norm, [n, D]. student_head: [V, D].
        labels: next tokens [n]; needed without a teacher, and where the mixture has cross-entropy. Beside a teacher a
            negative one leaves the cross-entropy out.
        softcap: cap on both models' logits (`final_logit_softcapping`), or None.
        chunk: tokens at a time; None: as many as fit `ELEMENTS` logits.

    Returns:
        Scalar in nats, summed (divide by the number of tokens of the whole global batch).

    Raises:
        ValueError: labels are missing; a temperature other than 1 with a kept distribution, whose rest has no shape.
    """
    needs_labels = teacher is None or mixture.cross_entropy > 0.0
    if needs_labels and labels is None:
        raise ValueError("cross-entropy needs labels")
    if isinstance(teacher, Kept) and mixture.temperature != 1.0:
        raise ValueError("recorded probabilities are of temperature 1; use temperature 1")
    narrow = student.is_cuda and torch.is_autocast_enabled("cuda")
    products = torch.get_autocast_dtype("cuda") if narrow else student_head.dtype
    with torch.autocast(student.device.type, enabled=False):
        return _TokenLoss.apply(
            student, student_head, teacher, labels if needs_labels else None, mixture, softcap, chunk, products
        )
