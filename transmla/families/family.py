"""The contract of a family adapter and what it reads from a source attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.geometry.rotary import SCALED, rope_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Why a scaled rotary embedding is carried over neither as it is nor as a stock one.
UNSUPPORTED = {
    "dynamic": "its frequencies change with the longest position of a batch, those of a conversion are fixed",
    "longrope": "it has one set of frequencies for short and one for long text, a conversion one",
}

# The attention module of a source: an nn.Module, whose projections and norms PyTorch types as "a tensor or a module".
SourceModule: TypeAlias = Any

# A configuration class's plan for a parallelism: the source's plan names projections that MLA does not have. Any,
# because the families' own classes type it as a dictionary.
NO_PLAN: Any = None


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over the d coordinates of every head: weight * x / sqrt(mean(x²) + eps).

    weight: [d], the effective one, float64. offset: what the source adds to its stored parameter (1 in Gemma, else 0).
    """

    weight: Tensor
    eps: float
    offset: float = 0.0

    def __call__(self, heads: Tensor) -> Tensor:
        """heads: [..., d] before the norm."""
        return heads * (heads.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight

    @property
    def parameter(self) -> Tensor:
        """The weight as the source stores it, [d]."""
        return self.weight - self.offset


@dataclass(frozen=True)
class SourceAttention:
    """Linear maps of one source attention in float64; D1 = D + 1, the last column is the bias (zero without one).

    query: [H, d, D1]. key, value: [G, d, D1]. output: [D, H, d]. output_bias: [D] or None.
    scaling: factor on the logits. Coordinates l and l + d/2 of queries and keys form a rotary pair.
    query_norm, key_norm: what follows `query` and `key` before the rotation, None where nothing does.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    output_bias: Tensor | None
    scaling: float
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None


def affine(linear: nn.Linear, heads: int, device: torch.device) -> Tensor:
    """Weight and bias of a projection to heads as one float64 map [heads, d, D1]."""
    weight = linear.weight.detach().to(device, torch.float64)
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().to(weight)
    return torch.cat([weight, bias[:, None]], dim=1).unflatten(0, (heads, -1))


def read_split_projections(attention: SourceModule, config: PretrainedConfig, device: torch.device) -> SourceAttention:
    """Read an attention that has `q_proj`, `k_proj`, `v_proj`, `o_proj` (Llama and its relatives)."""
    heads, groups = config.num_attention_heads, key_value_heads(config)
    output = attention.o_proj.weight.detach().to(device, torch.float64)
    bias = attention.o_proj.bias
    return SourceAttention(
        query=affine(attention.q_proj, heads, device),
        key=affine(attention.k_proj, groups, device),
        value=affine(attention.v_proj, groups, device),
        output=output.unflatten(1, (heads, -1)),
        output_bias=None if bias is None else bias.detach().to(device, torch.float64),
        scaling=float(attention.scaling),
    )


def key_value_heads(config: PretrainedConfig) -> int:
    """Number of key/value heads; older configurations leave it out where every query head has its own."""
    return config.num_key_value_heads or config.num_attention_heads


def shared_frequencies(model: PreTrainedModel, index: int) -> Tensor:
    """Rotary frequencies [d/2] of a model that has the same in every layer, in radians a position."""
    return model.model.rotary_emb.inv_freq


@dataclass(frozen=True)
class Family:
    """One source architecture.

    model_type: of the source's config.json.
    student_config: class registered with transformers' AutoConfig. architecture: name of the student's model class.
    source_config, source_architecture: likewise, of a source that transformers does not know.
    read_attention: (attention module, config, device) -> SourceAttention.
    head_norms: attention module -> norms of queries and keys, for a family that has them.
    frequencies: (source model, layer) -> [d/2], the layer's rotary frequencies.
    qkv_bias: whether query, key and value projections carry a bias. output_bias: whether the output does.
    refuse: returns why a configuration cannot be carried over, or None.
    inexpressible: returns why the student cannot become a stock DeepSeek checkpoint, or None; what every family
        shares is in transmla.export.expressible.
    notice: returns what the user should know about a conversion, or None.
    kernel: transformers' name of the attention that source and student run with by default.
    router: decoder layer -> the module whose `weight` [E, D] and `top_k` choose experts by a softmax, for a family that
        has them.
    plain_residual: whether the attention's output is added to the stream as it is, without a norm in between.
    """

    model_type: str
    student_config: type[PretrainedConfig]
    architecture: str
    source_config: type[PretrainedConfig] | None = None
    source_architecture: str | None = None
    read_attention: Callable[[SourceModule, PretrainedConfig, torch.device], SourceAttention] = read_split_projections
    head_norms: Callable[[SourceModule], tuple[HeadNorm, HeadNorm]] | None = None
    frequencies: Callable[[PreTrainedModel, int], Tensor] = shared_frequencies
    qkv_bias: Callable[[PretrainedConfig], bool] = lambda config: False
    output_bias: Callable[[PretrainedConfig], bool] = lambda config: False
    refuse: Callable[[PretrainedConfig], str | None] = lambda config: None
    inexpressible: Callable[[PretrainedConfig], str | None] = lambda config: None
    notice: Callable[[PretrainedConfig], str | None] = lambda config: None
    kernel: str = "sdpa"
    router: Callable[[SourceModule], SourceModule] | None = None
    plain_residual: bool = True

    @property
    def student_model(self) -> type[PreTrainedModel]:
        """The student's class."""
        return _model_class(self.architecture)

    @property
    def source_model(self) -> type[PreTrainedModel]:
        """The class of a source that transformers does not know."""
        assert self.source_architecture is not None, "only of such sources is it asked"
        return _model_class(self.source_architecture)

    def check(self, config: PretrainedConfig) -> None:
        """Refuse a configuration that the adapter would convert wrongly."""
        for rope_type in sorted(rope_types(config) - {"default", *SCALED}):
            why = f" ({UNSUPPORTED[rope_type]})" if rope_type in UNSUPPORTED else ""
            raise RecipeError("model.source", f"rope type {rope_type!r}{why} is not supported; use a model without it")
        if (reason := self.refuse(config)) is not None:
            raise RecipeError("model.source", reason)


def _model_class(name: str) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = getattr(importlib.import_module("transmla.families.students"), name)
    return found
