"""Values of a configuration that no model can have: refused before a model is built of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from transmla.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_values(config: PretrainedConfig, key: str) -> None:
    """Check the values that dimensions, norms and rotary frequencies are computed from. key: for errors.

    Raises:
        RecipeError: one of them cannot be meant.
    """
    wrong = next(_wrong_values(config), None)
    if wrong is not None:
        raise RecipeError(key, f"no model has {wrong}; correct its configuration")


def skeleton(config: PretrainedConfig, key: str) -> PreTrainedModel:
    """The source as transformers builds it, without memory for its weights. key: for errors.

    Raises:
        RecipeError: transformers builds none of this configuration.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # whatever a constructor does with a field that it does not know
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(key, f"transformers builds no model of its configuration: {reason}; correct it") from None


def _wrong_values(config: PretrainedConfig) -> Iterator[str]:
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or 1
    if heads % groups:
        yield f"{heads} query heads for {groups} key heads (num_attention_heads, num_key_value_heads)"
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        yield f"hidden_size {config.hidden_size} for {heads} heads (num_attention_heads) without a head_dim"
    if (getattr(config, "head_dim", None) or config.hidden_size // heads) % 2:
        yield f"an odd head dimension with rotary pairs (hidden_size {config.hidden_size}, {heads} heads)"
    eps = getattr(config, "rms_norm_eps", None)
    if eps is not None and not (math.isfinite(eps) and eps > 0):
        yield f"rms_norm_eps {eps}"
    for name, number in _rotary_numbers(getattr(config, "rope_parameters", None) or {}):
        if not (math.isfinite(number) and number > 0) or (name == "rope_theta" and number <= 1):
            yield f"{name} {number}"
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and token >= config.vocab_size:
                yield f"{name} {token} among {config.vocab_size} tokens (vocab_size)"


def _rotary_numbers(parameters: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of rotary parameters, which may be given by layer type."""
    for name, value in parameters.items():
        if isinstance(value, dict):
            yield from _rotary_numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value
