"""Every dimension of a conversion, derived once from the source's configuration and the recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.geometry.rotary import (
    Band,
    embedding_frequencies,
    has_nearest,
    natural_bands,
    rope_types,
    stock_bands,
    stock_rope,
)
from transmla.recipe.schema import Convert

MOST_RANKS = 8  # of tensor parallelism, in a plan: the cards of one host


@dataclass(frozen=True)
class MLAGeometry:
    """Dimensions of one attention, the same in every layer. Names are DeepSeek's and the source's own.

    Channel m of the rope head rotates at the source's frequency number `collapse * m`. Those are the frequencies of a
    stock rope of dimension P = `qk_rope_head_dim` with `rope_theta` raised to the power `collapse` * P / d: the
    source's own with the natural collapse d / P. freqfold: one for all layers, or one a layer. latent_heads: latents
    that `kv_lora_rank` is cut into, each for its share of the heads. tied: a head's value is its latent, the key
    without rotation the latent's first half. stock_rope: where the student's embedding is not the source's but the
    nearest stock one, what `rotary.stock_rope` says of it.
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
    freqfold: int | tuple[int, ...]
    collapse: int
    latent_norm: bool = False  # RMSNorm on the latents
    folded_biases: bool = False  # queries, keys and values have none
    latent_heads: int = 1
    tied: bool = False
    stock_rope: dict[str, Any] | None = None
    stock_router: bool = False  # experts are exported as DeepSeek's

    @property
    def theta_power(self) -> float:
        """Power of the source's rope_theta that gives the student's."""
        return self.collapse * self.qk_rope_head_dim / self.head_dim

    def freqfold_of(self, layer: int) -> int:
        """The freqfold of one layer."""
        return self.freqfold if isinstance(self.freqfold, int) else self.freqfold[layer]

    def bands(self, freqfold: int) -> list[Band]:
        """Which source frequencies share which channels of the rope head."""
        if self.stock_rope is None:
            return natural_bands(freqfold, self.collapse, self.qk_rope_head_dim // 2)
        return stock_bands(self.stock_rope, freqfold // self.collapse)

    def channel_frequencies(self, source: Tensor) -> Tensor:
        """Radians a position of the student's rope head, [P/2]. source: those of the source, [d/2]."""
        if self.stock_rope is not None:
            return embedding_frequencies(self.stock_rope["parameters"], self.qk_rope_head_dim).to(source)
        return source[:: self.collapse][: self.qk_rope_head_dim // 2]

    @property
    def source_cache(self) -> int:
        """Values the source caches per token and layer."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def cache(self) -> int:
        """Values the student caches per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def latent_size(self) -> int:
        """Values of one latent."""
        return self.kv_lora_rank // self.latent_heads

    @property
    def cache_by_ranks(self) -> list[dict[str, int]]:
        """Values per token and layer on each of so many `ranks` of tensor parallelism: of the `source` (a rank has one
        key/value head at least), of the student in `stock` DeepSeek engines, which keep all latents on every rank, and
        `split`: where a rank keeps the latents of its own heads."""
        heads, shared = self.num_attention_heads, (self.num_key_value_heads, self.latent_heads)
        return [
            {
                "ranks": ranks,
                "source": 2 * self.head_dim * max(1, self.num_key_value_heads // ranks),
                "stock": self.cache,
                "split": self.latent_size * max(1, self.latent_heads // ranks) + self.qk_rope_head_dim,
            }
            for ranks in range(1, max(MOST_RANKS, self.latent_heads) + 1)
            if heads % ranks == 0 and all(whole % ranks == 0 or ranks % whole == 0 for whole in shared)
        ]

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
            "cached_values_by_ranks": self.cache_by_ranks,
        }


def head_dimension(config: PretrainedConfig) -> int:
    """The source's head dimension, given or derived as transformers derives it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def derive_with(config: PretrainedConfig, convert: Convert, freqfold: tuple[int, ...] | None) -> MLAGeometry:
    """The geometry of settings in which nothing is `auto`.

    Raises:
        RecipeError: they do not fit the model.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    groups, head_dim = config.num_key_value_heads or heads, head_dimension(config)
    rope, latent = convert.qk_rope_head_dim, convert.kv_lora_rank
    assert rope != "auto" and latent != "auto" and convert.collapse != "auto", "`candidates` fills them in"
    if rope % 2:
        raise RecipeError("convert.qk_rope_head_dim", f"{rope} is odd; a rotary channel is a pair, use an even number")
    if rope > head_dim:
        raise RecipeError(
            "convert.qk_rope_head_dim", f"{rope} is above the head dimension {head_dim}; use at most that"
        )
    pairs, channels = head_dim // 2, rope // 2
    natural = head_dim // rope
    if convert.collapse == "natural" and head_dim % rope:
        raise RecipeError(
            "convert.qk_rope_head_dim",
            f"{rope} does not divide the head dimension {head_dim}; use one of "
            f"{[n for n in range(2, head_dim + 1, 2) if head_dim % n == 0]}, or name convert.collapse (1 to {natural})",
        )
    collapse = natural if convert.collapse == "natural" else convert.collapse
    if collapse * channels > pairs:
        raise RecipeError(
            "convert.collapse",
            f"{collapse} does not fit: {channels} channels at every {collapse}th of {pairs} frequencies; use at "
            f"most {natural}",
        )
    stock = convert.rope == "stock" and has_nearest(config)
    if collapse * rope != head_dim and rope_types(config) != {"default"} and not stock:
        raise RecipeError(
            "convert.collapse",
            f"the source scales its frequencies, so only the natural one can be exported; use {natural}, or "
            "convert.rope=stock",
        )
    one_fold = collapse if convert.freqfold == "auto" else convert.freqfold
    folds = one_fold if freqfold is None else freqfold
    for fold in (folds,) if isinstance(folds, int) else folds:
        if fold % collapse:
            raise RecipeError(
                "convert.freqfold", f"{fold} is not divisible by collapse {collapse}; use a multiple of {collapse}"
            )
        if fold > pairs:
            raise RecipeError(
                "convert.freqfold", f"{fold} is above the {pairs} frequencies of a head; use a smaller one"
            )
    _check_latents(convert, groups, latent, rope)
    full = full_rank(config, convert.latent_heads)
    if latent > full:
        raise RecipeError(
            "convert.kv_lora_rank",
            f"{latent} is above the rank of the model's keys and values; use at most {full}",
        )
    full_query = min(heads * (head_dim + rope), hidden)
    if convert.q_lora_rank is not None and convert.q_lora_rank > full_query:
        raise RecipeError(
            "convert.q_lora_rank",
            f"{convert.q_lora_rank} is above the rank of the model's queries; use at most {full_query} or null",
        )
    size = latent // convert.latent_heads
    return MLAGeometry(
        hidden_size=hidden,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        qk_nope_head_dim=size // 2 if convert.tied else head_dim,
        qk_rope_head_dim=rope,
        v_head_dim=size if convert.tied else head_dim,
        kv_lora_rank=latent,
        q_lora_rank=convert.q_lora_rank,
        freqfold=folds,
        collapse=collapse,
        latent_norm=convert.latent_norm,
        folded_biases=convert.biases == "fold",
        latent_heads=convert.latent_heads,
        tied=convert.tied,
        stock_rope=stock_rope(config, head_dim, collapse, rope) if stock else None,
        stock_router=convert.router == "stock",
    )


def _check_latents(convert: Convert, groups: int, latent: int, rope: int) -> None:
    """Several latents, and tied ones: whether heads, rank and norm can be shared among them.

    Raises:
        RecipeError: they cannot.
    """
    count, size = convert.latent_heads, latent // convert.latent_heads
    if groups % count:
        possible = [n for n in range(1, groups + 1) if groups % n == 0]
        raise RecipeError(
            "convert.latent_heads",
            f"{count} does not divide the model's {groups} key/value heads, and none can be shared; use one of "
            f"{possible}",
        )
    unit = count * (2 if convert.tied else 1)
    if latent % unit:
        why = f"into {count} latents" + (", whose first halves are keys" if convert.tied else "")
        raise RecipeError("convert.kv_lora_rank", f"{latent} does not divide {why}; use a multiple of {unit}")
    if convert.latent_norm and (count > 1 or convert.tied):
        raise RecipeError(
            "convert.latent_norm",
            "a real norm would run over all latents at once, and bind what is apart; use false, or latent_heads: 1 "
            "and tied: false",
        )
    if convert.tied and size > 2 * rope:
        raise RecipeError(
            "convert.kv_lora_rank",
            f"tied values of {size} would be wider than queries and keys ({size // 2} + rope {rope}), which fast "
            f"kernels do not take; use at most {2 * rope * count}, or a larger qk_rope_head_dim",
        )


def full_rank(config: PretrainedConfig, latents: int = 1) -> int:
    """The rank of a source's keys and values together, n·min(2·G·d/n, D) in n latents: that many lose nothing."""
    groups = config.num_key_value_heads or config.num_attention_heads
    return latents * min(2 * groups * head_dimension(config) // latents, config.hidden_size)
