"""Several latents, or tied ones, in DeepSeek's one `kv_b`: zero between the blocks, where there are any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from transmla.modeling.config_facts import is_tied, latent_heads


def is_grouped(config: PretrainedConfig) -> bool:
    """Whether a student's `kv_b` is another thing than one matrix."""
    return latent_heads(config) > 1 or is_tied(config)


def whole_up_projection(weights: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """The weights of one attention with `kv_b_proj.weight` [H·(N+V), R], and its bias where it has one, in the place of
    the parts that a student has."""
    if not is_grouped(config):
        return weights
    heads, latents, rank = config.num_attention_heads, latent_heads(config), config.kv_lora_rank
    keys, width, size = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim, rank // latents
    some = weights["kv_a_proj_with_mqa.weight"]
    whole = some.new_zeros(heads, width, rank)
    for index, rows in enumerate(whole.chunk(latents)):
        block = rows[:, :, index * size : (index + 1) * size]
        if is_tied(config):
            block.copy_(torch.cat((torch.eye(keys, size), torch.eye(size))))
        else:
            block.copy_(weights[f"kv_b_proj.{index}.weight"].unflatten(0, (heads // latents, width)))
    parts = [f"kv_b_proj.{index}.bias" for index in range(latents)]
    found = {name: value for name, value in weights.items() if not name.startswith("kv_b_proj.")}
    found["kv_b_proj.weight"] = whole.flatten(0, 1)
    if config.mla_qkv_bias:
        found["kv_b_proj.bias"] = (
            some.new_zeros(heads * width) if is_tied(config) else torch.cat([weights[name] for name in parts])
        )
    return found


def describe_blocks(config: PretrainedConfig) -> dict[str, Any]:
    """What the metadata of a stock checkpoint say of its `kv_b`; nothing where it is one matrix.

    Latent i is columns i·size to (i+1)·size of `kv_b`, for heads i·heads to (i+1)·heads; all other weights of these
    columns are zero. shared_columns: behind the last latent, for all heads (the constant that carries biases). tied:
    the block of a head is [first half of the latent; latent].
    """
    if not is_grouped(config):
        return {}
    latents = latent_heads(config)
    return {
        "kv_b_blocks": {
            "latent_heads": latents,
            "latent_size": config.kv_lora_rank // latents,
            "heads_of_a_latent": config.num_attention_heads // latents,
            "shared_columns": int(config.mla_qkv_bias),
            "tied": is_tied(config),
        }
    }
