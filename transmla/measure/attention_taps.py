"""Queries and keys of attentions, as a forward pass computes them, for a loss on attention's logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.modeling.attention import MLAAttention
from transmla.modeling.kernels.dispatch import TAP, attend
from transmla.modeling.kernels.eager import cap, eager_attention
from transmla.modeling.kernels.packed import PACKED
from transmla.recipe.stages import QUERIES


@dataclass(frozen=True)
class Tap:
    """What one attention compared. query: [B, H, Q, d] at `chosen` [Q]; key: [B, G, T, d]; mask: as the kernel got
    it."""

    query: Tensor
    key: Tensor
    chosen: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None

    def logits(self) -> Tensor:
        """[B, H, Q, T], before the mask."""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        with torch.autocast(key.device.type, enabled=False):  # the kernels' own logits are float32
            return cap(self.query.float() @ key.float().mT * self.scaling, self.softcap)

    def seen(self) -> Tensor:
        """Boolean, broadcastable to the logits."""
        if self.mask is None:
            return (self.chosen[:, None] >= torch.arange(self.key.shape[2], device=self.key.device))[None, None]
        rows = self.mask[:, :, self.chosen]
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2


def logit_errors(student: Tap, teacher: Tap) -> Tensor:
    """Divergence of the student's attention from the teacher's at the chosen queries, [B, Q] in nats."""
    return attention_divergence(student.logits(), teacher.logits(), teacher.seen())


def chosen_queries(length: int, device: torch.device) -> Tensor:
    """At most `QUERIES` positions, evenly spread, the last one among them."""
    stride = -(-length // QUERIES)
    return torch.arange(length - 1, -1, -stride, device=device).flip(0)


@contextmanager
def tapped(*models: PreTrainedModel) -> Iterator[dict[nn.Module, Tap]]:
    """Meanwhile every attention of the models leaves its queries and keys here, and computes what it always does."""
    taps: dict[nn.Module, Tap] = {}
    before = [model.config._attn_implementation for model in models]
    assert len(set(before)) == 1, "a student runs with its source's kernel"
    kernel = before[0]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options):
        chosen = chosen_queries(query.shape[2], query.device)
        taps[module] = Tap(query[:, :, chosen], key, chosen, mask, options["scaling"], options.get("softcap"))
        if isinstance(module, MLAAttention):
            return attend(module, query, key, value, mask, implementation=kernel, eager=eager_attention, **options)
        if kernel in ("sdpa", PACKED):  # without boundaries they are the same
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        repeat = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeat, dim=1) for states in (key, value))
        return eager_attention(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS.register(TAP, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(TAP, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    try:
        for model in models:
            model.config._attn_implementation = TAP
        yield taps
    finally:
        for model in models:
            model.config._attn_implementation = kernel
        taps.clear()  # the registry keeps the function, and it would keep every key


def attention_divergence(student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
    """KL(teacher ‖ student) of attention distributions, mean over heads, in nats: [B, Q].

    Args:
        student, teacher: logits [B, H, Q, S], whatever their common constants: softmax does not see those.
        seen: boolean, broadcastable to that, what a query attends to. One that sees nothing, as padding may, has
            divergence 0.
    """
    lowest = torch.finfo(
        torch.float32
    ).min  # minus infinity would make NaN of a query that sees nothing, and of its gradient
    log_q, log_p = (logits.float().masked_fill(~seen, lowest).log_softmax(-1) for logits in (student, teacher))
    gap = torch.where(seen, log_p - log_q, 0.0)
    return (log_p.exp() * gap).sum(-1).mean(1)
