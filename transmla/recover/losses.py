"""Divergences between two language models, from hidden states, in chunks over tokens.

No tensor of T×V numbers is ever whole: a chunk of logits exists, gives its share of the loss and of the gradients with
respect to the student's hidden states and head, and is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from transmla.modeling.backends import cap

CHUNK = 1024  # tokens whose logits exist at a time


def logits_float32(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [n, D] times head [V, D] transposed, in float32.

    Products of bfloat16 operands are accumulated and returned in float32: logits rounded to bfloat16 would spoil the
    gradient p_s - p_t when the two distributions are close.
    """
    if hidden.is_cuda and hidden.dtype == head.dtype == torch.bfloat16:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide) @ head.to(wide).T


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, student_head, teacher, teacher_head, temperature, softcap, chunk):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64 if wide == torch.float64 else torch.float32, device=student.device)
        grad_hidden = torch.empty_like(student) if need_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=wide) if need_head else None
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            logits = cap(logits_float32(student[part], student_head), softcap)
            log_s = F.log_softmax(logits / temperature, dim=-1)
            log_t = F.log_softmax(
                cap(logits_float32(teacher[part], teacher_head), softcap) / temperature, dim=-1
            )
            total += F.kl_div(log_s, log_t, log_target=True, reduction="sum")
            if need_hidden or need_head:
                # d/dlogits of T² KL(p_t ‖ p_s) with p = softmax(logits / T) is T (p_s - p_t).
                slope = (log_s.exp_() - log_t.exp_()) * temperature
                if softcap is not None:
                    slope *= 1.0 - (logits / softcap).square()
                if need_hidden:
                    grad_hidden[part] = (slope.to(student_head.dtype) @ student_head).to(student.dtype)
                if need_head:
                    grad_head += slope.T @ student[part].to(wide)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = student_head.dtype
        return total * temperature**2

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * grad).to(ctx.head_dtype),
            None,
            None,
            None,
            None,
            None,
        )


def forward_kl(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Sum over tokens of T² KL(teacher ‖ student) at temperature T (Hinton et al., arXiv:1503.02531, section 2.1).

    Gradients flow to the student's hidden states and head only, and once.

    Args:
        student, teacher: hidden states after the last norm, [n, D] each (their D may differ).
        student_head, teacher_head: [V, D].
        softcap: cap on both models' logits (`final_logit_softcapping`), or None.

    Returns:
        Scalar in nats, summed (divide by the number of tokens of the whole global batch).
    """
    with torch.autocast(student.device.type, enabled=False):
        return _ForwardKL.apply(student, student_head, teacher, teacher_head, temperature, softcap, chunk)


def normalised_error(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """Sum over tokens of |student - teacher|² / scale. student, teacher: [..., D]; scale: E|teacher|²."""
    return (student.float() - teacher.float()).square().sum() / scale
