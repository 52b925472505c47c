"""The divergence through two heads: time, memory and error, beside its products and the libraries that have one too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig

from transmla.bench.timing import REPEATED, milliseconds, once
from transmla.recover.divergence import Divergence
from transmla.recover.losses import Mixture, Teacher, token_loss

TOKENS = 8192
NEAR = 0.05  # root mean square of what a student's states have more than the teacher's, whose own is 1
CHECKED = 256  # tokens whose gradient is compared with float64
KINDS: dict[Literal["forward_kl", "reverse_kl", "jsd"], tuple[str, float]] = {  # name; beta as trl and Liger count it
    "forward_kl": ("forward KL", 0.0),
    "reverse_kl": ("reverse KL", 1.0),
    "jsd": ("Jensen-Shannon", 0.5),
}

Row = dict[str, Any]


@dataclass
class _States:
    """Hidden states [n, D] of a student near its teacher, and their head [V, D]."""

    student: Tensor
    teacher: Tensor
    head: Tensor


def divergence_rows(config: PretrainedConfig, dtype: torch.dtype) -> Iterator[Row]:
    """One row a divergence through a frozen head, and one of forward KL with a trained float32 head."""
    width, words = config.hidden_size, config.vocab_size
    teacher = torch.randn(TOKENS, width, device="cuda", dtype=dtype)
    student = (teacher.float() + NEAR * torch.randn_like(teacher, dtype=torch.float32)).to(dtype)
    head = (0.02 * torch.randn(words, width, device="cuda")).to(dtype)
    states = _States(student.requires_grad_(), teacher, head)
    for kind in KINDS:
        yield _row(states, kind, trained=False)
    yield _row(states, "forward_kl", trained=True)


def _row(states: _States, kind: Literal["forward_kl", "reverse_kl", "jsd"], *, trained: bool) -> Row:
    name, beta = KINDS[kind]
    head = states.head.float().requires_grad_() if trained else states.head
    loss = lambda: _own(states, head, kind)  # noqa: E731
    took, floor = _beside(loss, lambda: _products(states, trained))
    row: Row = {
        "kernel": f"{name} through a {'trained float32' if trained else 'frozen'} head",
        "shape": f"{len(states.student):,} x {len(head):,} x {head.shape[1]:,}",
        "ms": took,
        "GiB": _memory(loss, states, head) - (head.numel() * 4 / 2**30 if trained else 0.0),
        "others": {"four products" if trained else "three products": floor},
    }
    if not trained:
        row["gradient error"] = _error(states, kind)
    for library, peer in _peers(states, head, beta).items():
        row["others"][library] = milliseconds(peer)
    if trained:  # the others are faster with one in 16 bits, which learns less
        narrow = states.head.clone().requires_grad_()
        for library, peer in _peers(states, narrow, beta).items():
            row["others"][f"{library}, head in 16 bits"] = milliseconds(peer)
    head.grad = states.student.grad = None
    return row


def _own(states: _States, head: Tensor, kind: Literal["forward_kl", "reverse_kl", "jsd"]) -> None:
    states.student.grad = head.grad = None
    with torch.autocast("cuda", dtype=states.student.dtype):
        mixture = Mixture(Divergence(kind))
        total = token_loss(states.student, head, Teacher(states.teacher, states.head), mixture=mixture)
    total.backward()


def _products(states: _States, trained: bool) -> None:
    """The matrix products that no exact loss can do without, in slices as large as memory allows."""
    slopes = torch.empty(len(states.student) // 4, len(states.head), device="cuda", dtype=states.head.dtype)
    for part in states.student.detach().split(len(slopes)):
        torch.mm(part, states.head.T, out=slopes)
        torch.mm(part, states.head.T, out=slopes)
        torch.mm(slopes, states.head)
        if trained:
            torch.mm(slopes.T, part)


def _beside(loss: Callable[[], object], floor: Callable[[], object]) -> tuple[float, float]:
    """Medians of both, one after the other again and again: a card that grows warm slows both alike."""
    found: list[tuple[float, float]] = [(once(loss), once(floor)) for _ in range(REPEATED + 2)][2:]
    return statistics.median(one for one, _ in found), statistics.median(other for _, other in found)


def _memory(loss: Callable[[], object], states: _States, head: Tensor) -> float:
    """GiB that a call needs beside what is there, gradients included."""
    states.student.grad = head.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _error(states: _States, kind: Literal["forward_kl", "reverse_kl", "jsd"]) -> float:
    """Of the gradient by the states, against float64."""
    student = states.student[:CHECKED].detach().double().requires_grad_()
    head = states.head.double()
    log_q = F.log_softmax(student @ head.T, -1)
    log_p = F.log_softmax(states.teacher[:CHECKED].double() @ head.T, -1)
    if kind == "forward_kl":
        value = (log_p.exp() * (log_p - log_q)).sum()
    elif kind == "reverse_kl":
        value = (log_q.exp() * (log_q - log_p)).sum()
    else:
        middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, device="cuda"))
        value = ((log_p.exp() * (log_p - middle)).sum() + (log_q.exp() * (log_q - middle)).sum()) / 2
    value.backward()
    assert student.grad is not None
    few = _States(states.student[:CHECKED].detach().requires_grad_(), states.teacher[:CHECKED], states.head)
    _own(few, states.head, kind)
    assert few.student.grad is not None
    return float((few.student.grad.double() - student.grad).norm() / student.grad.norm())


def _peers(states: _States, head: Tensor, beta: float) -> dict[str, Callable[[], object]]:
    """The losses of trl and of Liger, where they are installed and still have their names."""
    found: dict[str, Callable[[], object]] = {}
    try:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss
    except ImportError:
        pass
    else:
        seen = torch.ones(1, len(states.student), device="cuda")

        def trl() -> None:
            states.student.grad = head.grad = None
            with torch.autocast("cuda", dtype=states.student.dtype):
                total = _chunked_divergence_loss(
                    states.student[None], states.teacher[None], head, states.head, seen, beta
                )[0]
            total.backward()

        found["trl"] = trl
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        pass
    else:
        module = LigerFusedLinearJSD(jsd_beta=beta)

        def liger() -> None:
            states.student.grad = head.grad = None
            with torch.autocast("cuda", dtype=states.student.dtype):
                total = module(states.student, head, states.teacher, states.head, None)
            total.backward()

        found["Liger"] = liger
    return found
