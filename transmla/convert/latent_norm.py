"""Weights of the latents' RMSNorm that keep the latents' scale, from the calibration's second moment."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_of(maps: Tensor, second_moment: Tensor) -> float:
    """Root mean square of the latent c = maps x over tokens and channels, sqrt(trace(W C W^T) / R).

    With RMSNorm's weight equal to it, E|norm(c) * weight|^2 = E|c|^2 exactly. The mean over tokens of each token's
    own rms is never above it (Jensen); on SmolLM2-135M it is 0.5 to 3 % below, 1.5 % in the mean of its layers.

    Args:
        maps: [R, D1], bias in the last column. second_moment: of [x; 1], [D1, D1].
    """
    return float((torch.einsum("rx,xy,ry->", maps, second_moment, maps) / len(maps)).clamp_min(1e-30).sqrt())


def norm_weights(weights: dict[str, Tensor], augmented: Tensor, kv_lora_rank: int) -> dict[str, Tensor]:
    """RMSNorm weights of one attention's latents: `kv_a_layernorm.weight` [R], and `q_a_layernorm.weight` where there
    is a query latent.

    RMSNorm divides a token's latent by its own rms. The weight puts back the rms over the calibration text, so that
    what `kv_b` was solved for is met on average; only the spread of the rms between tokens is lost. (The inverse rms,
    as TransMLA's released code takes, would apply the division twice.)

    Args:
        weights: state dict of `MLAAttention`, solved. augmented: second moment of [x; 1], [D1, D1].
    """
    latent = torch.cat((weights["kv_a_proj_with_mqa.weight"], weights["kv_a_proj_with_mqa.bias"][:, None]), dim=1)[
        :kv_lora_rank
    ]
    out = {"kv_a_layernorm.weight": latent.new_full((kv_lora_rank,), scale_of(latent, augmented))}
    if "q_a_proj.weight" in weights:
        query = weights["q_a_proj.weight"]
        out["q_a_layernorm.weight"] = query.new_full((len(query),), scale_of(query, augmented[:-1, :-1]))
    return out
