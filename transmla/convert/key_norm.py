"""Keys behind a norm as linear maps: the best one, by least squares from streamed moments.

A cached latent is linear in the attention's input x, so a normalised key k̂ = norm(W x) has to be. The best map of
[x; 1] is E[k̂ [x;1]^T] E[[x;1] [x;1]^T]^{-1}, the mean taken half over all tokens, half over those that are attended to
(a key that nobody looks at may be wrong). What it leaves unexplained over all tokens is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transmla.convert.calibration import LayerStatistics
from transmla.families.family import SourceAttention

RIDGE = 1e-7  # of the mean eigenvalue of E[x x^T]


@dataclass(frozen=True)
class KeyFit:
    """maps: [G, d, D1]. error: [G], share of the variance of k̂ that the map leaves (1 - R²)."""

    maps: Tensor
    error: Tensor


def fit_keys(source: SourceAttention, statistics: LayerStatistics) -> KeyFit:
    """Regress normalised keys on the augmented input.

    Directions of x that calibration hardly saw are pulled towards the norm with a constant root mean square, c·w·W,
    not towards zero. Exact when the norm is linear on the calibration text.

    Args:
        source: its `key_norm` is there.
        statistics: with `key_cross`, `attended_key_cross` and `key_energy`.
    """
    norm, everywhere = source.key_norm, statistics.augmented()
    plain_cross, attended_cross, energy = statistics.key_cross, statistics.attended_key_cross, statistics.key_energy
    assert norm is not None and plain_cross is not None and attended_cross is not None and energy is not None
    moment = (everywhere + statistics.augmented_attended()) / 2
    cross = (plain_cross + attended_cross) / 2
    linear = source.key * norm.weight[:, None]  # [G, d, D1]
    scale = (linear * cross).sum((1, 2)) / torch.einsum("gwx,xy,gwy->g", linear, moment, linear).clamp_min(1e-30)
    prior = scale[:, None, None] * linear
    ridge = RIDGE * moment.diagonal().mean()
    damped = moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    maps = prior + torch.linalg.solve(damped, (cross - prior @ moment).mT).mT
    left = energy - 2 * (maps * plain_cross).sum((1, 2)) + torch.einsum("gwx,xy,gwy->g", maps, everywhere, maps)
    variance = energy - plain_cross[..., -1].square().sum(1)
    return KeyFit(maps=maps, error=(left / variance.clamp_min(1e-30)).clamp_min(0.0))


def with_linear_keys(source: SourceAttention, fit: KeyFit) -> SourceAttention:
    """The same attention with the norm of its keys and the projection before it replaced by the fitted map."""
    return replace(source, key=fit.maps, key_norm=None)


def describe_key_errors(errors: list[float]) -> str:
    """One line on what linear keys lose. errors: 1 - R² by layer, the mean over key heads."""
    by_layer = ", ".join(f"{index}: {100 * error:.1f}" for index, error in enumerate(errors))
    return (
        "keys pass a norm and become linear; share of their variance that no linear map explains "
        f"on the calibration text, mean {100 * sum(errors) / len(errors):.1f} %, by layer in %: {by_layer}"
    )
