"""What llama.cpp's `deepseek2` reads wrongly or not at all of a checkpoint: seen from its configuration.

Read in llama.cpp as llama-cpp-python 0.3.36 carries it (src/models/deepseek2.cpp, src/llama-context.cpp).
"""

from __future__ import annotations

from transformers import PretrainedConfig

from transmla.export.dimensions import EPS

# Depths that llama.cpp takes for DeepSeek-V2-Lite and its like, which have no query latent.
LITE_DEPTHS = (26, 27)
LITE_48_VOCABULARY = 128256  # with this vocabulary also 48 layers are taken for one

SERVE = "serve it with transformers or with vllm serve --model-impl transformers"


def unreadable(config: PretrainedConfig) -> str | None:
    """Why llama.cpp would not compute what a checkpoint is, with the ways out; None: it does."""
    if config.model_type != "deepseek_v3":
        return (
            f"llama.cpp has DeepSeek's classes, and this is a {config.model_type}; export the model as a stock "
            f"checkpoint (export.format deepseek_v3 says what hinders), or {SERVE}"
        )
    if config.attention_bias:
        return (
            "its attention has biases (attention_bias), for which llama.cpp has no place; export the model without "
            f"biases, or {SERVE}"
        )
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, llama.cpp computes silu; {SERVE}"
    if not config.rope_interleave:
        return (
            f"its rotary coordinates are half-split (rope_interleave false), llama.cpp reads interleaved ones; {SERVE}"
        )
    if config.rms_norm_eps != EPS:
        return (
            f"its rms_norm_eps is {config.rms_norm_eps:g}, which llama.cpp takes for the norms of the latents too, "
            f"where transformers has {EPS:g}; export the model with this package, which makes both {EPS:g}"
        )
    if config.first_k_dense_replace < config.num_hidden_layers:
        return (
            f"it has layers with experts (from layer {config.first_k_dense_replace} on), which are not written; {SERVE}"
        )
    depth = config.num_hidden_layers
    lite = depth in LITE_DEPTHS or (depth == 48 and config.vocab_size == LITE_48_VOCABULARY)
    if config.q_lora_rank is not None and lite:
        return (
            f"llama.cpp takes {depth} layers for a DeepSeek-V2-Lite, which has no query latent, and this has one "
            f"(q_lora_rank {config.q_lora_rank}); convert the model with convert.q_lora_rank null, or {SERVE}"
        )
    return _unreadable_rope(config)


def _unreadable_rope(config: PretrainedConfig) -> str | None:
    """The same of the rotary embedding: llama.cpp has the default one, and YaRN as DeepSeek scales it."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind == "default":
        return None
    if kind != "yarn":
        return (
            f"its rotary embedding has {kind} scaling, which llama.cpp computes otherwise for this architecture, "
            f"without a message; {SERVE}"
        )
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if not scales[0] or scales[0] != scales[1]:
        return (
            f"its YaRN has mscale {scales[0]} and mscale_all_dim {scales[1]}, llama.cpp computes what both being equal "
            f"and not zero mean; {SERVE}"
        )
    if rope.get("attention_factor") is not None or rope.get("truncate") is False:
        return f"its YaRN names attention_factor or truncate, which llama.cpp does not read; {SERVE}"
    return None
