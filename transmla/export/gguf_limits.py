"""What llama.cpp reads wrongly or not at all of a checkpoint, seen from its configuration before a file is made."""

from __future__ import annotations

from transformers import PretrainedConfig

from transmla.export.dimensions import EPS
from transmla.export.engines import reading_of

ENGINE = "llama.cpp"
SERVE = "serve it with transformers or with vllm serve DIR --model-impl transformers"


def unreadable(config: PretrainedConfig) -> str | None:
    """Why a GGUF would not be what a checkpoint is, with the ways out; None: it is."""
    if config.model_type != "deepseek_v3":
        return (
            f"{ENGINE} has DeepSeek's classes, and this is a {config.model_type}; export the model as a stock "
            "checkpoint (export.format=deepseek_v3 says what hinders), or serve it with transformers"
        )
    if not (reading := reading_of(ENGINE, config)).reads:
        return f"{ENGINE} would not read it rightly: {'; '.join(reading.why)}; {SERVE}"
    if config.rms_norm_eps != EPS:
        return (
            f"its rms_norm_eps is {config.rms_norm_eps:g}, which {ENGINE} takes for the norms of the latents too, "
            f"where transformers has {EPS:g}; export the model with this package, which makes both {EPS:g}"
        )
    if config.first_k_dense_replace < config.num_hidden_layers and (reason := _unwritten(config)) is not None:
        return f"it has experts (from layer {config.first_k_dense_replace} on) {reason}, which are not written; {SERVE}"
    if (config.rope_parameters or {}).get("truncate") is False:
        return f"its YaRN is not truncated (rope_parameters.truncate), which {ENGINE} always does; {SERVE}"
    return None


def _unwritten(config: PretrainedConfig) -> str | None:
    """What experts have that a file by this project does not say, or None."""
    if getattr(config, "scoring_func", None) != "softmax" or not config.norm_topk_prob:
        return "that are not weighed by a softmax over the chosen ones"
    if getattr(config, "topk_method", None) != "greedy" or config.n_group != 1:
        return "that are chosen by groups, or with a bias"
    if getattr(config, "moe_layer_freq", 1) != 1:
        return "in some layers alone"
    return None
