"""Dimensions of a student's attention on both sides of an export, and what the linear latent norm needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from transmla.modeling.config_facts import latent_heads

EPS = 1e-6  # transformers hard-codes it in the latent norms

LATENT_SCALE = 2.0**-30  # a power of two: exact in every binary format

PADDED = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}


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
    latents, rank = latent_heads(config), PADDED["kv_lora_rank"]
    if latents > 1 and own.kv_lora_rank < rank:
        raise ValueError(
            f"export.layout: {latents} latents of {own.kv_lora_rank // latents} would be padded to {rank} together, "
            f"which is another block size; use compact, or convert.kv_lora_rank {rank}"
        )
    return Dimensions(**PADDED)


def rope_slots(source: int, target: int) -> Tensor:
    """Where the student's half-split rotary coordinates go in DeepSeek's interleaved rope head.

    Channel m, coordinates (m, m + P/2), goes to the channel of `target` with the same frequency, coordinates (2n,
    2n+1). With P dividing P' that is n = m·P'/P, the same rope_theta giving theta^(-2n/P') = theta^(-2m/P).

    Returns:
        [P] indices into the target's P' coordinates.
    """
    channel = torch.arange(source // 2) * (target // source)
    return torch.cat((2 * channel, 2 * channel + 1))
