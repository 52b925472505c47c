"""Whether a stock DeepSeek-V3 checkpoint can express a student, in which number formats, and who reads it wrongly."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from transmla.families import family_of_student
from transmla.geometry import rope_types
from transmla.modeling.config_facts import shortest_sliding_window
from transmla.modeling.latents import latent_heads


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


# What serving engines' own DeepSeek classes make of a scaled rotary embedding, by its kind.
SCALED_ROPE = {
    "llama3": "vLLM and SGLang compute YaRN's, llama.cpp the unscaled one, all without a message",
    "linear": "vLLM stops with a KeyError, SGLang computes YaRN's and llama.cpp the unscaled one without a message",
}
INSTEAD = "serve it with vllm serve --model-impl transformers or with transformers, which are exact"


def native_engine_notes(config: PretrainedConfig) -> tuple[str, ...]:
    """What a user has to know before serving the stock checkpoint of a student, a sentence each with what to do.

    Such a checkpoint is exact in transformers, and some engines read it otherwise without an error.
    """
    notes = []
    if config.mla_qkv_bias:
        notes.append(
            "biases on queries, keys and values: the native DeepSeek classes of vLLM and SGLang drop them without a "
            f"message, and llama.cpp does not load the checkpoint; {INSTEAD}"
        )
    for kind in sorted(rope_types(config) & set(SCALED_ROPE)):
        notes.append(f"{kind} scaling of the rotary embedding: in native classes {SCALED_ROPE[kind]}; {INSTEAD}")
    if (latents := latent_heads(config)) > 1:
        notes.append(
            f"{latents} latents, each for its share of the heads: engines read one block-sparse kv_b, and with tensor "
            "parallelism keep all latents on every rank; what an engine needs to keep a rank's own alone is in "
            "transmla.json (kv_b_blocks)"
        )
    if blocking_dtype(config, torch.float16) is not None:
        notes.append(
            "do not run it in float16, nor with kv_a and q_a quantised to f16 or q8_0: their rows are scaled by 2^-30 "
            "and would become zero; use bfloat16 or float32, also where an engine chooses (vllm serve --dtype bfloat16)"
        )
    return tuple(notes)


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
