"""What the families whose queries and keys pass a norm (Qwen3, Gemma 3) share."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PretrainedConfig

from transmla.families.family import HeadNorm, SourceAttention, SourceModule, read_split_projections

INEXPRESSIBLE = "queries and keys pass a norm that DeepSeek's attention does not have"


def plain_head_norms(attention: SourceModule) -> tuple[HeadNorm, HeadNorm]:
    """`q_norm` and `k_norm` whose weight is used as it is stored."""
    query, key = (
        HeadNorm(norm.weight.detach().double(), norm.variance_epsilon) for norm in (attention.q_norm, attention.k_norm)
    )
    return query, key


def centred_head_norms(attention: SourceModule) -> tuple[HeadNorm, HeadNorm]:
    """Gemma's `q_norm` and `k_norm`, which multiply by 1 + weight."""
    query, key = (
        HeadNorm(1.0 + norm.weight.detach().double(), norm.eps, offset=1.0)
        for norm in (attention.q_norm, attention.k_norm)
    )
    return query, key


def read_plain(attention: SourceModule, config: PretrainedConfig, device: torch.device) -> SourceAttention:
    """Projections and norms of Qwen3."""
    query, key = plain_head_norms(attention)
    return replace(read_split_projections(attention, config, device), query_norm=query, key_norm=key)


def read_centred(attention: SourceModule, config: PretrainedConfig, device: torch.device) -> SourceAttention:
    """Projections and norms of Gemma 3."""
    query, key = centred_head_norms(attention)
    return replace(read_split_projections(attention, config, device), query_norm=query, key_norm=key)
