"""From the student to a stock `deepseek_v3` checkpoint: names, configuration, the linear latent norm.

Stock engines always apply RMSNorm to the latent c, and some read its eps from `rms_norm_eps`, others hard-code 1e-6.
Scaling the latent's rows of `kv_a` by s = 2^-30 makes mean(c²) vanish against eps, so RMSNorm(c) = c / sqrt(eps); a
norm weight of sqrt(eps) / s restores the latent. That needs rms_norm_eps = 1e-6; for a source with another eps the
whole residual stream is scaled by alpha = sqrt(1e-6 / eps), which every other norm undoes exactly.

A student with experts (`mla_stock_router`) gets routers whose logits are shifted down (transmla.convert.router_shift).

A student that has real norms on its latents (`mla_latent_norm`) keeps them: same weights, same eps, no scaling.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from transmla.convert.router_shift import RouterShift
from transmla.export.deepseek_names import ATTENTION, LAYER, SHARED_EXPERT, NameMap, name_map, template
from transmla.export.dimensions import EPS, LATENT_SCALE, Dimensions, export_dimensions, rope_slots, student_dimensions
from transmla.export.expressible import blocking_dtype, blocking_feature, has_latent_norm
from transmla.export.latent_blocks import whole_up_projection
from transmla.geometry.rotary import logit_factor

# What writes into the residual stream: scaled where the source's eps is another than the format's.
RESIDUAL_WRITERS = (
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "mlp.down_proj.weight",
    "mlp.experts.down_proj",
)


ROUTER = "mlp.gate.weight"

BLOCK = 2**24  # numbers that exist in float64 at a time while a large matrix is scaled


def export_state(
    student: PreTrainedModel, layout: str, dtype: torch.dtype, *, shifts: Tensor | None = None
) -> dict[str, Tensor]:
    """State dict of the DeepSeek-V3 model, computed in float64 and stored in `dtype`, on the CPU.

    Exact up to that rounding: logits of the exported model equal the student's. Routers are float32 at least, as
    transformers has them.

    Args:
        shifts: of the routers' logits, [2, layers, D] (`Findings.router_shifts`); None where there are no experts.

    Raises:
        ValueError: the student has a feature that the format cannot express, or weights that `dtype` cannot hold.
    """
    head = {"lm_head.weight": student.get_output_embeddings().weight}  # a tied one may be no entry of its own
    return export_tensors(student.state_dict() | head, student.config, layout, dtype, shifts=shifts)


@torch.no_grad()
def export_tensors(
    state: Mapping[str, Tensor],
    config: PretrainedConfig,
    layout: str,
    dtype: torch.dtype,
    *,
    shifts: Tensor | None = None,
) -> dict[str, Tensor]:
    """Some tensors of the DeepSeek-V3 model, as in `export_state`.

    Args:
        state: tensors of the student by name; of an attention all or none. config: of the student. shifts: as in
            `export_state`.
    """
    if (reason := blocking_feature(config) or blocking_dtype(config, dtype)) is not None:
        raise ValueError(f"export: {reason}")
    own, to, names = student_dimensions(config), export_dimensions(config, layout), name_map(config)
    alpha = (EPS / config.rms_norm_eps) ** 0.5
    out: dict[str, Tensor] = {}
    attention: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        pattern, layer = template(name)
        inside = pattern.removeprefix(LAYER) if layer is not None else ""
        if layer is not None and pattern.startswith(ATTENTION) and inside not in RESIDUAL_WRITERS:
            attention.setdefault(layer, {})[pattern.removeprefix(ATTENTION)] = value.double().cpu()
            continue
        value = value.detach().cpu()
        if inside == ROUTER:
            assert layer is not None and shifts is not None, "a student with mla_stock_router has them beside it"
            out |= _router(value, RouterShift(*shifts[:, layer]), config, layer, dtype)
            continue
        if name.endswith("o_proj.weight"):
            value = _pad_columns(value, config.num_attention_heads, own.v_head_dim, to.v_head_dim)
        scaled = name == "model.embed_tokens.weight" or inside in RESIDUAL_WRITERS
        out[names.to_deepseek[pattern].format(layer)] = _scaled(value, alpha, dtype) if scaled else value.to(dtype)
    for index, weights in attention.items():
        prefix = ATTENTION.format(index)
        if config.mla_qkv_bias:
            writer = state[f"{prefix}o_proj.weight"].detach().cpu()
            out[f"{prefix}o_proj.bias"] = (alpha * _output_bias(weights, writer, config, own)).to(dtype)
        for name, value in _attention_state(weights, config, own, to, names).items():
            out[f"{prefix}{name}"] = value.to(dtype)
    return {name: value.contiguous().clone() for name, value in out.items()}


def _router(
    weight: Tensor, shift: RouterShift, config: PretrainedConfig, layer: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A router [E, D] whose logits are shifted down, and the shared expert that its layer gets, of zeros."""
    prefix, size, hidden = LAYER.format(layer), config.intermediate_size, config.hidden_size
    shifted = weight.double() - shift.at(dtype)
    out = {f"{prefix}{ROUTER}": shifted.to(torch.promote_types(dtype, torch.float32))}
    for name in SHARED_EXPERT:
        shape = (hidden, size) if name == "down_proj" else (size, hidden)
        out[f"{prefix}mlp.shared_experts.{name}.weight"] = torch.zeros(shape, dtype=dtype)
    return out


def _scaled(value: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """value · factor, multiplied in float64 and stored in `dtype`, block by block: an embedding of 2 GB would take 20
    otherwise."""
    out = torch.empty_like(value, dtype=dtype, memory_format=torch.contiguous_format)
    rows = max(1, BLOCK // max(1, value[0].numel()))
    for source, target in zip(value.split(rows), out.split(rows), strict=True):
        target.copy_(source.double() * factor)
    return out


def _pad_columns(weight: Tensor, heads: int, width: int, target: int) -> Tensor:
    """[D, H*width] -> [D, H*target] with zeros."""
    blocks = weight.unflatten(1, (heads, width))
    return torch.nn.functional.pad(blocks, (0, target - width)).flatten(1)


def _place(rows: Tensor, own: Dimensions, to: Dimensions) -> Tensor:
    """Query rows of one layout to the other: [H, nope + P, n] -> [H, nope' + P', n], scale of the logits kept."""
    heads, _, width = rows.shape
    out = rows.new_zeros(heads, to.qk_head_dim, width)
    out[:, : own.qk_nope_head_dim] = rows[:, : own.qk_nope_head_dim]
    slots = to.qk_nope_head_dim + rope_slots(own.qk_rope_head_dim, to.qk_rope_head_dim)
    out[:, slots] = rows[:, own.qk_nope_head_dim :]
    return out * (to.qk_head_dim / own.qk_head_dim) ** 0.5


def _output_bias(weights: dict[str, Tensor], writer: Tensor, config: PretrainedConfig, own: Dimensions) -> Tensor:
    """Bias [D] of the output projection, float64; zero unless the latent has a real norm.

    Behind a real norm no latent channel is constant. The bias of the values still is one of the output, since attention
    weights sum to one; the bias of the keys adds the same number to every logit of a query and may be dropped.
    """
    if not has_latent_norm(config):
        return torch.zeros(config.hidden_size, dtype=torch.float64)
    bias = weights["kv_b_proj.bias"].unflatten(0, (config.num_attention_heads, -1))[:, own.qk_nope_head_dim :]
    return writer.double() @ bias.flatten()


def _attention_state(
    weights: dict[str, Tensor], config: PretrainedConfig, own: Dimensions, to: Dimensions, names: NameMap
) -> dict[str, Tensor]:
    """One attention's weights in float64, output projection excepted, by DeepSeek's names."""
    heads, hidden, weights = config.num_attention_heads, config.hidden_size, whole_up_projection(weights, config)
    biased, normed = config.mla_qkv_bias, has_latent_norm(config)
    constant = biased and not normed
    norm = EPS**0.5 / LATENT_SCALE
    # Padding lowers the mean square that a real norm divides by: R' channels of which R are not zero.
    stretch = (to.kv_lora_rank / own.kv_lora_rank) ** 0.5
    scale = stretch if normed else LATENT_SCALE
    out: dict[str, Tensor] = {}

    latent, rope = weights["kv_a_proj_with_mqa.weight"].split([own.kv_lora_rank, own.qk_rope_head_dim])
    rank = to.kv_lora_rank + constant
    down = latent.new_zeros(rank + to.qk_rope_head_dim, hidden)
    down[: own.kv_lora_rank] = latent * scale
    slots = rope_slots(own.qk_rope_head_dim, to.qk_rope_head_dim)
    down[rank + slots] = rope
    out[names.attention("kv_a_proj_with_mqa.weight")] = down
    out["kv_a_layernorm.weight"] = latent.new_full((rank,), norm)
    if normed:
        out["kv_a_layernorm.weight"][: own.kv_lora_rank] = weights["kv_a_layernorm.weight"] / stretch
        out["kv_a_layernorm.weight"][own.kv_lora_rank :] = 1.0

    up = weights["kv_b_proj.weight"].unflatten(0, (heads, -1))
    k_nope, value = up.split([own.qk_nope_head_dim, own.v_head_dim], dim=1)
    full = up.new_zeros(heads, to.qk_nope_head_dim + to.v_head_dim, rank)
    full[:, : own.qk_nope_head_dim, : own.kv_lora_rank] = k_nope
    full[:, to.qk_nope_head_dim : to.qk_nope_head_dim + own.v_head_dim, : own.kv_lora_rank] = value

    if biased:
        # The format has biases on q_a and kv_a only. One latent channel that holds the constant 1 carries those of
        # kv_b (not behind a real norm) and, behind a query latent that is the input itself, those of the query.
        bias = weights["kv_a_proj_with_mqa.bias"]
        down_bias = bias.new_zeros(rank + to.qk_rope_head_dim)
        down_bias[: own.kv_lora_rank] = bias[: own.kv_lora_rank] * scale
        down_bias[rank + slots] = bias[own.kv_lora_rank :]
        out[names.attention("kv_a_proj_with_mqa.bias")] = down_bias
    if constant:
        down_bias[rank - 1] = LATENT_SCALE
        k_bias, v_bias = (
            weights["kv_b_proj.bias"].unflatten(0, (heads, -1)).split([own.qk_nope_head_dim, own.v_head_dim], dim=1)
        )
        full[:, : own.qk_nope_head_dim, rank - 1] = k_bias
        full[:, to.qk_nope_head_dim : to.qk_nope_head_dim + own.v_head_dim, rank - 1] = v_bias
    out["kv_b_proj.weight"] = full.flatten(0, 1)

    if config.q_lora_rank is not None:
        up_query = weights["q_b_proj.weight"]
        out["q_a_layernorm.weight"] = latent.new_full((config.q_lora_rank,), norm)
        out["q_a_proj.weight"] = weights["q_a_proj.weight"] * LATENT_SCALE
        if normed:
            out["q_a_layernorm.weight"] = weights["q_a_layernorm.weight"]
            out["q_a_proj.weight"] = weights["q_a_proj.weight"]
        if biased:
            up_query = up_query @ weights["q_a_proj.weight"]
    else:
        up_query = weights["q_proj.weight"]
    if biased:
        query_bias = weights["q_proj.bias" if config.q_lora_rank is None else "q_b_proj.bias"]
        up_query = torch.cat((up_query, query_bias[:, None]), dim=1)
        out["q_a_proj.weight"] = torch.cat((torch.eye(hidden), torch.zeros(1, hidden))).double() * LATENT_SCALE
        out["q_a_proj.bias"] = torch.cat((torch.zeros(hidden), torch.ones(1))).double() * LATENT_SCALE
        out["q_a_layernorm.weight"] = latent.new_full((hidden + 1,), norm)
    placed = _place(up_query.unflatten(0, (heads, -1)), own, to).flatten(0, 1) / logit_factor(config.rope_parameters)
    out[names.attention("q_proj.weight" if config.q_lora_rank is None else "q_b_proj.weight")] = placed
    return out
