"""Every dimension of a conversion, derived once from the source's configuration and the recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.recipe import Convert


@dataclass(frozen=True)
class MLAGeometry:
    """Dimensions of one attention, the same in every layer. Names are DeepSeek's and the source's own.

    `frequencies` of the student's rope head are those of a stock rope of dimension `qk_rope_head_dim` with the
    source's `rope_theta`, because channel m rotates at the source's frequency number `collapse * m`.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None
    freqfold: int
    collapse: int
    latent_norm: bool = False  # RMSNorm on the latents

    @property
    def source_cache(self) -> int:
        """Values the source caches for a token and layer."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def cache(self) -> int:
        """Values the student caches for a token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def saving(self) -> float:
        """Share of the cache that is saved, in [0, 1]; negative where the student caches more."""
        return 1.0 - self.cache / self.source_cache

    def describe(self) -> dict[str, Any]:
        """All dimensions and the cache figures, for a plan or a report."""
        return asdict(self) | {
            "cached_values_source": self.source_cache,
            "cached_values_student": self.cache,
            "saving_percent": round(100 * self.saving, 2),
        }


def head_dimension(config: PretrainedConfig) -> int:
    """The source's head dimension, given or derived as transformers derives it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def derive_geometry(config: PretrainedConfig, convert: Convert) -> MLAGeometry:
    """Derive and check every dimension.

    Args:
        config: configuration of the source model.
        convert: the recipe's section.

    Raises:
        RecipeError: a rank above what the model has, a rope dimension that is odd or does not divide the head
            dimension, a freqfold that collapse does not divide.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    groups, head_dim = config.num_key_value_heads or heads, head_dimension(config)
    rope = convert.qk_rope_head_dim
    if rope % 2:
        raise RecipeError("convert.qk_rope_head_dim", f"{rope} is odd; a rotary channel is a pair, use an even number")
    if rope > head_dim or head_dim % rope:
        divisors = [n for n in range(2, head_dim + 1, 2) if head_dim % n == 0]
        raise RecipeError(
            "convert.qk_rope_head_dim", f"{rope} does not divide the head dimension {head_dim}; use one of {divisors}"
        )
    natural = head_dim // rope
    collapse = natural if convert.collapse == "auto" else convert.collapse
    if collapse != natural:
        raise RecipeError(
            "convert.collapse",
            f"{collapse} does not fit: head dimension {head_dim} / qk_rope_head_dim {rope} = {natural}; use auto",
        )
    pairs = head_dim // 2
    freqfold = default_freqfold(pairs, collapse) if convert.freqfold == "auto" else convert.freqfold
    if freqfold % collapse:
        raise RecipeError(
            "convert.freqfold", f"{freqfold} is not divisible by collapse {collapse}; use a multiple of {collapse}"
        )
    if pairs % freqfold:
        raise RecipeError(
            "convert.freqfold", f"{freqfold} does not divide the {pairs} frequencies of a head; use a divisor"
        )
    full = full_rank(config)
    if convert.kv_lora_rank > full:
        raise RecipeError(
            "convert.kv_lora_rank",
            f"{convert.kv_lora_rank} is above the rank of the model's keys and values; use at most {full}",
        )
    full_query = min(heads * (head_dim + rope), hidden)
    if convert.q_lora_rank is not None and convert.q_lora_rank > full_query:
        raise RecipeError(
            "convert.q_lora_rank",
            f"{convert.q_lora_rank} is above the rank of the model's queries; use at most {full_query} or null",
        )
    return MLAGeometry(
        hidden_size=hidden,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=rope,
        v_head_dim=head_dim,
        kv_lora_rank=convert.kv_lora_rank,
        q_lora_rank=convert.q_lora_rank,
        freqfold=freqfold,
        collapse=collapse,
        latent_norm=convert.latent_norm,
    )


def full_rank(config: PretrainedConfig) -> int:
    """The rank of a source's keys and values together, min(2·G·d, D): a latent of that rank loses nothing."""
    groups = config.num_key_value_heads or config.num_attention_heads
    return min(2 * groups * head_dimension(config), config.hidden_size)


def default_freqfold(pairs: int, collapse: int) -> int:
    """The freqfold of `auto`: one channel a band, the best of a small search with complex mixing."""
    assert pairs % collapse == 0
    return collapse
