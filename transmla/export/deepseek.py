"""From the student to a stock `deepseek_v3` checkpoint: names, configuration, the linear latent norm.

Stock engines always apply RMSNorm to the latent c, and some read its eps from `rms_norm_eps`, others hard-code 1e-6.
Scaling the latent's rows of `kv_a` by s = 2^-30 makes mean(c²) vanish against eps, so RMSNorm(c) = c / sqrt(eps); a norm
weight of sqrt(eps) / s restores the latent. That needs rms_norm_eps = 1e-6; for a source with another eps the whole
residual stream is scaled by alpha = sqrt(1e-6 / eps), which every other norm undoes exactly.

A student that has real norms on its latents (`mla_latent_norm`) keeps them: same weights, same eps, no scaling.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DeepseekV3Config, PretrainedConfig, PreTrainedModel

from transmla.families import family_of_student
from transmla.modeling.window import shortest_window

EPS = 1e-6  # transformers hard-codes it in the latent norms
LATENT_SCALE = 2.0**-30  # a power of two: exact in every binary format
PADDED = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}

# Student's name -> DeepSeek's, by the part after `model.layers.N.`; what is not listed keeps its name.
RESIDUAL_WRITERS = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight")


@dataclass(frozen=True)
class Dimensions:
    """Head and latent dimensions of one side of the export."""

    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def student_dimensions(config: PretrainedConfig) -> Dimensions:
    """The student's own dimensions."""
    return Dimensions(**{name: getattr(config, name) for name in PADDED})


def export_dimensions(config: PretrainedConfig, layout: str) -> Dimensions:
    """Dimensions of the exported model: the student's own, or padded to what the engines' fast kernels take.

    Raises:
        ValueError: the student does not fit the padded layout.
    """
    own = student_dimensions(config)
    if layout == "compact":
        return own
    for name, size in PADDED.items():
        if getattr(own, name) > size:
            raise ValueError(f"export.layout: {name} {getattr(own, name)} is above the padded {size}; use compact")
    if PADDED["qk_rope_head_dim"] % own.qk_rope_head_dim:
        raise ValueError(f"export.layout: qk_rope_head_dim {own.qk_rope_head_dim} does not divide 64; use compact")
    return Dimensions(**PADDED)


def blocking_feature(config: PretrainedConfig) -> str | None:
    """Why a student cannot become a stock checkpoint, or None."""
    if (reason := family_of_student(config).inexpressible(config)) is not None:
        return reason
    if (window := shortest_window(config)) is not None:
        return f"DeepSeek's attention has no sliding window, this model's is {window} of {config.max_position_embeddings} positions"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not DeepSeek's silu"
    if getattr(config, "mlp_bias", False):
        return "the feed-forward layers have biases, DeepSeek's have none"
    if config.mla_output_bias:
        return "the attention output has a bias, which native engines drop without a word"
    if has_latent_norm(config) and config.mla_qkv_bias and config.q_lora_rank is not None:
        return "a query bias behind a normed query latent has no place in the format: leave q_lora_rank or the norm out"
    return None


def has_latent_norm(config: PretrainedConfig) -> bool:
    """Whether the student's latents have real norms (students made before there was a choice have none)."""
    return getattr(config, "mla_latent_norm", False)


def blocking_dtype(config: PretrainedConfig, dtype: torch.dtype) -> str | None:
    """Why a student cannot be stored in a number format, or None.

    float16's smallest number is 2^-24: rows scaled by 2^-30 would be stored as zeros.
    """
    if dtype == torch.float16 and (config.mla_qkv_bias or not has_latent_norm(config)):
        return (
            "float16 cannot hold the linear latent norm (rows scaled by 2^-30 would become zero): use float32 or "
            "bfloat16" + ("" if config.mla_qkv_bias else ", or a real latent norm")
        )
    return None


def deepseek_config(config: PretrainedConfig, layout: str, dtype: torch.dtype) -> DeepseekV3Config:
    """Configuration that every engine reads in the same way (all layers dense)."""
    to = export_dimensions(config, layout)
    biased = config.mla_qkv_bias
    constant = biased and not has_latent_norm(config)  # one channel of the latent that carries biases
    return DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=EPS,
        use_cache=True,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=False,
        rope_parameters=dict(config.rope_parameters),
        rope_interleave=True,
        attention_bias=biased,
        attention_dropout=0.0,
        q_lora_rank=config.hidden_size + 1 if biased else config.q_lora_rank,
        kv_lora_rank=to.kv_lora_rank + constant,
        qk_nope_head_dim=to.qk_nope_head_dim,
        qk_rope_head_dim=to.qk_rope_head_dim,
        v_head_dim=to.v_head_dim,
        first_k_dense_replace=config.num_hidden_layers,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
        dtype=dtype,
    )


def rope_slots(source: int, target: int) -> Tensor:
    """Where the student's half-split rotary coordinates go in DeepSeek's interleaved rope head.

    Channel m, coordinates (m, m + P/2), goes to the channel of `target` with the same frequency, coordinates (2n, 2n+1).
    With P dividing P' that is n = m·P'/P, the same rope_theta giving theta^(-2n/P') = theta^(-2m/P).

    Returns:
        [P] indices into the target's P' coordinates.
    """
    channel = torch.arange(source // 2) * (target // source)
    return torch.cat((2 * channel, 2 * channel + 1))


@torch.no_grad()
def export_state(student: PreTrainedModel, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of the DeepSeek-V3 model, computed in float64 and stored in `dtype`, on the CPU.

    Exact up to that rounding: logits of the exported model equal the student's.

    Raises:
        ValueError: the student has a feature that the format cannot express, or weights that `dtype` cannot hold.
    """
    config = student.config
    if (reason := blocking_feature(config) or blocking_dtype(config, dtype)) is not None:
        raise ValueError(f"export: {reason}")
    own, to = student_dimensions(config), export_dimensions(config, layout)
    alpha = (EPS / config.rms_norm_eps) ** 0.5
    out: dict[str, Tensor] = {}
    attention: dict[int, dict[str, Tensor]] = {}
    for name, value in student.state_dict().items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match and match[2].startswith("self_attn.") and match[2] not in RESIDUAL_WRITERS:
            attention.setdefault(int(match[1]), {})[match[2].removeprefix("self_attn.")] = value.double().cpu()
            continue
        value = value.detach().cpu()
        if name == "model.embed_tokens.weight" or (match and match[2] in RESIDUAL_WRITERS):
            value = value.double() * alpha
            if name.endswith("o_proj.weight"):
                value = _pad_columns(value, config.num_attention_heads, own.v_head_dim, to.v_head_dim)
        out[name] = value.to(dtype)
    out["lm_head.weight"] = student.get_output_embeddings().weight.detach().cpu().to(dtype)
    for index, weights in attention.items():
        if config.mla_qkv_bias:
            writer = student.model.layers[index].self_attn.o_proj.weight.detach().cpu()
            bias = alpha * _output_bias(weights, writer, config, own)
            out[f"model.layers.{index}.self_attn.o_proj.bias"] = bias.to(dtype)
        for name, value in _attention_state(weights, config, own, to).items():
            out[f"model.layers.{index}.self_attn.{name}"] = value.to(dtype)
    return {name: value.contiguous().clone() for name, value in out.items()}


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
    weights: dict[str, Tensor], config: PretrainedConfig, own: Dimensions, to: Dimensions
) -> dict[str, Tensor]:
    """One attention's weights in float64, output projection excepted."""
    heads, hidden = config.num_attention_heads, config.hidden_size
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
    out["kv_a_proj_with_mqa.weight"] = down
    out["kv_a_layernorm.weight"] = latent.new_full((rank,), norm)
    if normed:
        out["kv_a_layernorm.weight"][: own.kv_lora_rank] = weights["kv_a_layernorm.weight"] / stretch
        out["kv_a_layernorm.weight"][own.kv_lora_rank :] = 1.0

    up = weights["kv_b_proj.weight"].unflatten(0, (heads, -1))
    k_nope, value = up.split([own.qk_nope_head_dim, own.v_head_dim], dim=1)
    full = up.new_zeros(heads, to.qk_nope_head_dim + to.v_head_dim, rank)
    full[:, : own.qk_nope_head_dim, : own.kv_lora_rank] = k_nope
    full[:, to.qk_nope_head_dim : to.qk_nope_head_dim + own.v_head_dim, : own.kv_lora_rank] = value
    out["kv_b_proj.weight"] = full

    if biased:
        # The format has biases on q_a and kv_a only. One latent channel that holds the constant 1 carries those of
        # kv_b (not behind a real norm) and, behind a query latent that is the input itself, those of the query.
        bias = weights["kv_a_proj_with_mqa.bias"]
        down_bias = bias.new_zeros(rank + to.qk_rope_head_dim)
        down_bias[: own.kv_lora_rank] = bias[: own.kv_lora_rank] * scale
        down_bias[rank + slots] = bias[own.kv_lora_rank :]
        out["kv_a_proj_with_mqa.bias"] = down_bias
    if constant:
        down_bias[rank - 1] = LATENT_SCALE
        k_bias, v_bias = weights["kv_b_proj.bias"].unflatten(0, (heads, -1)).split(
            [own.qk_nope_head_dim, own.v_head_dim], dim=1
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
    placed = _place(up_query.unflatten(0, (heads, -1)), own, to).flatten(0, 1)
    out["q_b_proj.weight" if biased or config.q_lora_rank is not None else "q_proj.weight"] = placed
    return out
