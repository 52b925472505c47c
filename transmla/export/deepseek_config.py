"""The configuration of an exported DeepSeek-V3 checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV3Config, PretrainedConfig

from transmla.export.dimensions import EPS, export_dimensions
from transmla.export.expressible import has_latent_norm
from transmla.modeling.config_facts import has_experts


def deepseek_config(config: PretrainedConfig, layout: str, dtype: torch.dtype) -> DeepseekV3Config:
    """Configuration that every engine reads in the same way: all layers dense, or all of experts."""
    to = export_dimensions(config, layout)
    biased = config.mla_qkv_bias
    constant = biased and not has_latent_norm(config)  # one channel of the latent that carries biases
    return DeepseekV3Config(  # type: ignore[call-arg]  # num_nextn_predict_layers: the engines read it
        architectures=["DeepseekV3ForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=EPS,
        use_cache=True,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=False,
        rope_parameters=dict(config.rope_parameters),
        rope_interleave=True,
        attention_bias=biased,
        attention_dropout=0.0,
        q_lora_rank=config.hidden_size + 1 if biased else config.q_lora_rank,
        kv_lora_rank=to.kv_lora_rank + constant,
        qk_nope_head_dim=to.qk_nope_head_dim,
        qk_rope_head_dim=to.qk_rope_head_dim,
        v_head_dim=to.v_head_dim,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
        dtype=dtype,
        **_experts(config),
    )


def _experts(config: PretrainedConfig) -> dict[str, Any]:
    """Which layers have experts, and how these are chosen.

    transformers has a sigmoid, whatever `scoring_func` says, and is right by the shift of the logits; whoever follows
    `scoring_func` is right by that.
    """
    if not has_experts(config):
        return {"first_k_dense_replace": config.num_hidden_layers, "n_routed_experts": 2, "num_experts_per_tok": 1}
    return {
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "n_routed_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "moe_router_dtype": "float32",  # vLLM would round shifted logits to 16 bits
        "router_fp32": True,  # SGLang would round the router
        "router_shifted": True,
    }
