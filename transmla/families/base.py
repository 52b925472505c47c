"""The contract of a family adapter and what it reads from a source attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from transmla.errors import RecipeError


@dataclass(frozen=True)
class SourceAttention:
    """Linear maps of one source attention in float64; D1 = D + 1, the last column is the bias (zero without one).

    query: [H, d, D1]. key, value: [G, d, D1]. output: [D, H, d]. output_bias: [D] or None.
    scaling: factor on the logits. Coordinates l and l + d/2 of queries and keys form a rotary pair.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    output_bias: Tensor | None
    scaling: float


def affine(linear: nn.Linear, heads: int, device: torch.device) -> Tensor:
    """Weight and bias of a projection to heads as one float64 map [heads, d, D1]."""
    weight = linear.weight.detach().to(device, torch.float64)
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().to(weight)
    return torch.cat([weight, bias[:, None]], dim=1).unflatten(0, (heads, -1))


def read_split_projections(attention: nn.Module, config: PretrainedConfig, device: torch.device) -> SourceAttention:
    """Read an attention that has `q_proj`, `k_proj`, `v_proj`, `o_proj` (Llama and its relatives)."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
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


@dataclass(frozen=True)
class Family:
    """One source architecture.

    model_type: of the source's config.json.
    student_config, student_model: classes registered with transformers' Auto classes.
    read_attention: (attention module, config, device) -> SourceAttention.
    qkv_bias: whether query, key and value projections carry a bias.
    refuse: returns why a configuration cannot be carried over, or None.
    """

    model_type: str
    student_config: type[PretrainedConfig]
    student_model: type[PreTrainedModel]
    read_attention: Callable[[nn.Module, PretrainedConfig, torch.device], SourceAttention] = read_split_projections
    qkv_bias: Callable[[PretrainedConfig], bool] = lambda config: False
    refuse: Callable[[PretrainedConfig], str | None] = lambda config: None

    def check(self, config: PretrainedConfig) -> None:
        """Refuse a configuration that the adapter would convert wrongly."""
        rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ("default", "llama3", "linear"):
            raise RecipeError("model.source", f"rope type {rope_type!r} is not supported; use a model without it")
        if (reason := self.refuse(config)) is not None:
            raise RecipeError("model.source", reason)
