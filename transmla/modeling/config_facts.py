"""What a configuration says beyond dimensions: which layers see only a window, and a cap on the final logits."""

from __future__ import annotations

from transformers import PretrainedConfig


def layer_types(config: PretrainedConfig) -> list[str]:
    """`full_attention` or `sliding_attention` for every layer, as transformers' trunks build their masks."""
    types = getattr(config, "layer_types", None)  # Mistral and Mixtral have one window for all layers, Llama none
    if types is None:
        sliding = getattr(config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    return types


def sliding_window_of(config: PretrainedConfig, index: int) -> int | None:
    """Tokens that layer `index` sees, itself included; None: all."""
    return config.sliding_window if layer_types(config)[index] == "sliding_attention" else None


def shortest_sliding_window(config: PretrainedConfig) -> int | None:
    """The shortest window that any layer has within the positions of the model, or None."""
    windows = [sliding_window_of(config, index) for index in range(config.num_hidden_layers)]
    return min((w for w in windows if w is not None and w < config.max_position_embeddings), default=None)


def has_rope_by_layer(config: PretrainedConfig) -> bool:
    """Whether the rotary embedding differs by layer type (Gemma 3), so that it has to be told which."""
    return any(isinstance(value, dict) for value in (config.rope_parameters or {}).values())


def final_softcap(config: PretrainedConfig) -> float | None:
    """The cap on a model's final logits (Gemma 2), or None."""
    return getattr(config, "final_logit_softcapping", None)  # a field of Gemma's configurations alone


def latent_heads(config: PretrainedConfig) -> int:
    """Number of latents of a student."""
    return getattr(config, "mla_latent_heads", 1)


def is_tied(config: PretrainedConfig) -> bool:
    """Whether a head's value is its latent itself, and its key without rotation the latent's first half."""
    return getattr(config, "mla_tied", False)


def has_stock_router(config: PretrainedConfig) -> bool:
    """Whether what an export needs to write a student's router as DeepSeek's was measured by its conversion."""
    return getattr(config, "mla_stock_router", False)


def has_experts(config: PretrainedConfig) -> bool:
    """Whether the feed-forward layers of a student are mixtures of experts."""
    return bool(getattr(config, "num_local_experts", None))  # a field of Mixtral's alone
