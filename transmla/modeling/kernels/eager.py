"""Softmax attention written out: the reference for every other kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(logits / softcap), or the logits themselves without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """The definition, written out; the reference for every other kernel. Returns ([B, T, H, V], [B, H, T, S])."""
    logits = cap(query @ key.transpose(2, 3) * scaling, softcap)
    if mask is not None:
        logits = logits + mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
