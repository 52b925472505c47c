"""All weights of a student attention from a source attention and its calibration statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transmla.convert.bias_folding import fold_queries_and_values, fold_rotating_keys
from transmla.convert.calibration import LayerStatistics
from transmla.convert.latent_shares import Errors, Latent, latent_bias, solve_latents
from transmla.convert.low_rank import low_rank
from transmla.convert.rope import DecoupledRope, decouple_rope
from transmla.families.family import SourceAttention
from transmla.geometry import MLAGeometry
from transmla.recipe.schema import Convert

RIDGE = (
    1e-3  # of the mean eigenvalue; little text needs it (2,048 tokens: KL 1.41 in place of 1.99), much does not mind
)


def closed_form_weights(
    source: SourceAttention,
    statistics: LayerStatistics,
    frequencies: Tensor,
    geometry: MLAGeometry,
    settings: Convert,
    *,
    freqfold: int,
) -> dict[str, Tensor]:
    """Solve one layer in float64.

    Exact when nothing is truncated: one key head, every frequency kept, kv_lora_rank at least 2·d, no query rank;
    of the low-rank step alone, latents of 2·d for each of their key/value heads.

    Args:
        frequencies: [d/2], the source's rotary frequencies. freqfold: of this layer.

    Returns:
        State dict of `MLAAttention` (bias entries included; the caller drops those the student does not have).
    """
    heads, groups = geometry.num_attention_heads, geometry.num_key_value_heads
    repeat = heads // groups
    covariance = statistics.second_moment - torch.outer(statistics.mean, statistics.mean)
    augmented = statistics.augmented()
    assert source.key_norm is None, "keys behind a norm are fitted first (transmla.convert.key_norm)"
    if geometry.folded_biases:
        source = fold_queries_and_values(source, statistics)
    key, query = source.key, source.query
    if source.query_norm is None:
        query_moment = torch.einsum("hwx,xy,hvy->hwv", query, augmented, query)
    else:
        assert statistics.query_moment is not None, "calibration measures it where queries pass a norm"
        query_moment = statistics.query_moment
    value = source.value[..., :-1]

    output = torch.einsum("xhw,xhv->hwv", source.output, source.output)

    rope = decouple_rope(
        torch.eye(geometry.head_dim, dtype=key.dtype, device=key.device).expand(heads, -1, -1),
        key,
        augmented,
        frequencies,
        bands=geometry.bands(freqfold),
        channels=geometry.qk_rope_head_dim // 2,
        distance=statistics.distance if settings.mean_rotation else None,
        mixing=settings.mixing,
    )
    # The bias of a key without rotation adds the same number to every logit of a query: softmax does not see it.
    k_nope = rope.k_nope[..., :-1]
    if geometry.folded_biases:
        channels = geometry.channel_frequencies(frequencies)
        queries = statistics.logit_cost[:, None, None] * (rope.q_rope @ query_moment @ rope.q_rope.mT)
        rope = replace(rope, k_rope=fold_rotating_keys(rope.k_rope, queries, channels, statistics))
    moment = rope.q_nope @ query_moment @ rope.q_nope.mT  # [H, d, d]
    value_cost = output.unflatten(0, (groups, repeat)).sum(1)

    def cost_of_keys(importance: Tensor) -> Tensor:
        each = (importance * source.scaling**2)[:, None, None] * moment
        return settings.kv_balance * each.unflatten(0, (groups, repeat)).sum(1)

    if settings.weighting == "attention":
        # A key error counts where it differs between the tokens of one query, z z^T taken off. Half of the weight stays
        # on all tokens alike: one that is not attended to must not become so.
        key_moment = damped((statistics.attended - statistics.averaged + covariance) / 2)
        value_moment = damped(statistics.averaged)
        errors = Errors(key_moment, value_moment, cost_of_keys(statistics.logit_cost), value_cost)
    elif settings.weighting == "input":
        # Output variance that a head's values carry: what one unit of its squared logit error costs.
        spread = torch.einsum("gwx,xy,gvy->gwv", value, covariance, value).repeat_interleave(repeat, 0)
        key_cost = cost_of_keys(torch.einsum("hwv,hwv->h", spread, output))
        errors = Errors(statistics.second_moment, statistics.second_moment, key_cost, value_cost)
    else:
        plain = statistics.second_moment
        errors = Errors(plain, plain, None, None, balance=settings.kv_balance)

    shape: dict[str, Any] = {"latents": geometry.latent_heads, "tied": geometry.tied}
    solved = solve_latents(k_nope, value, errors, rank=geometry.kv_lora_rank, **shape)
    down, bias = torch.cat([one.down for one in solved]), k_nope.new_zeros(geometry.kv_lora_rank)
    wide_output = source.output
    if geometry.tied:
        bias = _tied_bias(solved, source.value[..., -1], errors.value_cost)
        rope, wide_output = _into_queries_and_output(solved, rope, wide_output, bias)
        weights = _queries(source, rope, augmented, geometry)
    else:
        weights = _queries(source, rope, augmented, geometry) | _up_projections(solved, source.value[..., -1], repeat)
    weights |= {
        "kv_a_proj_with_mqa.weight": torch.cat((down, rope.k_rope[:, :-1])),
        "kv_a_proj_with_mqa.bias": torch.cat((bias, rope.k_rope[:, -1])),
        "o_proj.weight": wide_output.flatten(1),
    }
    if source.output_bias is not None:
        weights["o_proj.bias"] = source.output_bias
    return weights


def _up_projections(solved: list[Latent], value_bias: Tensor, repeat: int) -> dict[str, Tensor]:
    """Weights of `kv_b_proj`, of one latent or by latent. value_bias: [G, d]."""
    found: dict[str, Tensor] = {}
    for index, (latent, bias) in enumerate(zip(solved, value_bias.chunk(len(solved)), strict=True)):
        name = "kv_b_proj" if len(solved) == 1 else f"kv_b_proj.{index}"
        up = torch.cat([up.repeat_interleave(repeat, 0) for up in (latent.up_key, latent.up_value)], dim=1)
        bias = bias.repeat_interleave(repeat, 0)  # [H/n, d]
        found |= {
            f"{name}.weight": up.flatten(0, 1),
            f"{name}.bias": torch.cat((torch.zeros_like(bias), bias), dim=1).flatten(),
        }
    return found


def _tied_bias(solved: list[Latent], value_bias: Tensor, value_cost: Tensor | None) -> Tensor:
    """The latents' constants [R] in the place of the values' biases [G, d]."""
    count = len(solved)
    costs = [None] * count if value_cost is None else list(value_cost.chunk(count))
    shares = zip(solved, value_bias.chunk(count), costs, strict=True)
    return torch.cat([latent_bias(latent, bias, cost) for latent, bias, cost in shares])


def _into_queries_and_output(
    solved: list[Latent], rope: DecoupledRope, output: Tensor, bias: Tensor
) -> tuple[DecoupledRope, Tensor]:
    """Fold the maps from tied latents back to the source's heads into queries and output.

    q_h · (B_g T1) = (B_g^T q_h) · T1 and O_h (A_g T) = (O_h A_g) T. output: [D, H, d]. bias: [R], of the latents.

    Returns:
        the maps with queries of nope [H, r/2, n] and one key a latent, [n, r/2, D1]; the output [D, H, r].
    """
    up_key, up_value = (torch.cat([getattr(one, name) for one in solved]) for name in ("up_key", "up_value"))
    repeat = len(rope.q_nope) // len(up_key)
    keys = [
        torch.cat((one.down, constant[:, None]), dim=1)[: up_key.shape[-1]]
        for one, constant in zip(solved, bias.chunk(len(solved)), strict=True)
    ]
    q_nope = up_key.repeat_interleave(repeat, 0).mT @ rope.q_nope
    wide = torch.einsum("xhd,hdr->xhr", output, up_value.repeat_interleave(repeat, 0))
    return replace(rope, q_nope=q_nope, k_nope=torch.stack(keys)), wide


def damped(moment: Tensor) -> Tensor:
    """A second moment [n, n] with `RIDGE` of its mean eigenvalue added: directions that the calibration text hardly has
    must not be free."""
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _queries(
    source: SourceAttention, rope: DecoupledRope, augmented: Tensor, geometry: MLAGeometry
) -> dict[str, Tensor]:
    """Query weights. What decoupling does to queries is linear in the source's d coordinates of a head, one map M_h
    [nope + P, d] a head: without a norm M_h goes into the projection, with one it stays behind the norm.

    MLA divides logits by sqrt(nope + rope), so the ratio to the source's scale is folded in.
    """
    ratio = source.scaling * (geometry.qk_nope_head_dim + geometry.qk_rope_head_dim) ** 0.5
    mix = torch.cat((rope.q_nope, rope.q_rope), dim=1) * ratio  # [H, nope + P, d]
    if source.query_norm is not None:
        return {
            "q_proj.weight": source.query[..., :-1].flatten(0, 1),
            "q_proj.bias": source.query[..., -1].flatten(),
            "q_norm.weight": source.query_norm.parameter,
            "q_mix.weight": mix,
        }
    maps = mix @ source.query  # [H, nope + P, D1]
    bias = maps[..., -1].flatten()
    if geometry.q_lora_rank is None:
        return {"q_proj.weight": maps[..., :-1].flatten(0, 1), "q_proj.bias": bias}
    keys = torch.cat((rope.k_nope, rope.k_rope.expand(len(rope.k_nope), -1, -1)), dim=1)  # [G, nope + P, D1]
    cost = torch.einsum("gwx,xy,gvy->gwv", keys, augmented, keys).repeat_interleave(len(maps) // len(keys), 0)
    down, up = low_rank(maps[..., :-1], augmented[:-1, :-1], cost, geometry.q_lora_rank)
    return {"q_a_proj.weight": down, "q_b_proj.weight": up.flatten(0, 1), "q_b_proj.bias": bias}
