"""Muon for the matrices of the decoder layers, AdamW for everything else, as one optimizer.

Muon (K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) takes the momentum of a
matrix's gradient and sets all its singular values to about 1. Its steps are scaled to the length of AdamW's (J. Liu et
al., "Muon is scalable for LLM training", arXiv:2502.16982, section 2.2): the same learning rates serve both.

torch.optim.Muon takes one matrix after another, which on a GPU costs more than the matrices of a small model need. Here
all of one shape go together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

MUON = "muon"  # of a parameter group: whether its parameters are matrices for Muon

MOMENTUM = 0.95

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial, K. Jordan's: singular values end between 0.7 and 1.2

STEPS = 5  # of the polynomial

SCALE = 0.2  # root mean square of AdamW's steps, which Muon's are given (arXiv:2502.16982, section 2.2)

AT_ONCE = 2**26  # numbers that are worked on together


class MuonAdamW(torch.optim.AdamW):
    """AdamW that leaves the groups marked `muon` to Muon.

    Of these groups `lr` and `weight_decay` mean what they mean to AdamW; betas and eps are not used. Parameters have 2
    dimensions, or three, where the first counts matrices (experts). State: `step`, and `momentum_buffer` of the
    parameter's shape.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get(MUON)]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get(MUON):
                for values in _alike(group["params"]):
                    self._step_of(values, group["lr"], group["weight_decay"])
        return loss

    def _step_of(self, values: list[Tensor], rate: float, decay: float) -> None:
        """One step of parameters of one shape."""
        rows, columns = values[0].shape[-2:]
        buffers = [self._buffer(value) for value in values]
        gradients = [value.grad for value in values if value.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, buffers, MOMENTUM)).view(-1, rows, columns)
        step = orthogonal(ahead).view(len(values), *values[0].shape).to(values[0].dtype)
        if decay:
            torch._foreach_mul_(values, 1 - rate * decay)
        torch._foreach_add_(values, list(step.unbind()), alpha=-rate * SCALE * max(rows, columns) ** 0.5)

    def _buffer(self, value: Tensor) -> Tensor:
        state = self.state[value]
        if "momentum_buffer" not in state:
            state["step"] = torch.zeros(())  # which AdamW asks of every state that it reads
            state["momentum_buffer"] = torch.zeros_like(value, memory_format=torch.contiguous_format)
        state["step"] += 1
        found: Tensor = state["momentum_buffer"]
        return found


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices with the singular vectors of the given ones and singular values between about 0.7 and 1.2.

    Args:
        matrices: [n, rows, columns].

    Returns:
        [n, rows, columns]; on a GPU in bfloat16, which Muon's inventors found enough, elsewhere in float32.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if tall else matrices  # the products of the short sides are the small ones
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    found = found.to(torch.bfloat16 if found.is_cuda else torch.float32)
    for _ in range(STEPS):
        square = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


def is_matrix(name: str, value: Tensor) -> bool:
    """Whether a parameter is Muon's: a matrix of a decoder layer. Its inventors advise against it for embeddings and
    heads."""
    return ".layers." in name and value.ndim in (2, 3)


def _alike(values: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that have a gradient by shape, and of these as many together as `AT_ONCE` allows."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for value in values:
        if value.grad is not None:
            shapes.setdefault(value.shape, []).append(value)
    for found in shapes.values():
        size = max(1, AT_ONCE // found[0].numel())
        for first in range(0, len(found), size):
            yield found[first : first + size]
