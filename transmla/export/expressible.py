"""Whether a stock DeepSeek-V3 checkpoint can express a student, and in which number formats."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from transmla.families import family_of_student
from transmla.modeling.config_facts import shortest_sliding_window


def blocking_feature(config: PretrainedConfig) -> str | None:
    """Why a student cannot become a stock checkpoint, or None."""
    if (reason := family_of_student(config).inexpressible(config)) is not None:
        return reason
    if (window := shortest_sliding_window(config)) is not None:
        positions = config.max_position_embeddings
        return f"DeepSeek's attention has no sliding window, this model's is {window} of {positions} positions"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not DeepSeek's silu"
    if getattr(config, "mlp_bias", False):
        return "the feed-forward layers have biases, DeepSeek's have none"
    if config.mla_output_bias:
        return "the attention output has a bias, which native engines drop without a word"
    if has_latent_norm(config) and config.mla_qkv_bias and config.q_lora_rank is not None:
        return "a query bias behind a normed query latent has no place in the format: leave q_lora_rank or the norm out"
    return None


def has_latent_norm(config: PretrainedConfig) -> bool:
    """Whether the student's latents have real norms (students made before there was a choice have none)."""
    return getattr(config, "mla_latent_norm", False)


def blocking_dtype(config: PretrainedConfig, dtype: torch.dtype) -> str | None:
    """Why a student cannot be stored in a number format, or None.

    float16's smallest number is 2^-24: rows scaled by 2^-30 would be stored as zeros.
    """
    if dtype == torch.float16 and (config.mla_qkv_bias or not has_latent_norm(config)):
        return (
            "float16 cannot hold the linear latent norm (rows scaled by 2^-30 would become zero): use float32 or "
            "bfloat16" + ("" if config.mla_qkv_bias else ", or a real latent norm")
        )
    return None
