"""Queries and keys behind a norm as linear maps: the best ones, by least squares from streamed moments.

A cached latent is linear in the attention's input x, so a normalised key k̂ = norm(W x) has to be; a stock checkpoint
has no norm on queries either. The best map of [x; 1] is E[k̂ [x;1]^T] E[[x;1] [x;1]^T]^{-1}. For keys the mean is taken
half over all tokens, half over those that are attended to (a key that nobody looks at may be wrong), for queries over
all. What a map leaves unexplained over all tokens is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from transmla.convert.calibration import LayerStatistics
from transmla.convert.query_latent import query_latent
from transmla.families.family import HeadNorm, SourceAttention

RIDGE = 1e-7  # of the mean eigenvalue of E[x x^T]


@dataclass(frozen=True)
class LinearFit:
    """maps: [heads, d, D1]. error: [heads], share of the variance behind the norm that the map leaves (1 - R²)."""

    maps: Tensor
    error: Tensor


def fit_keys(source: SourceAttention, statistics: LayerStatistics, *, constant: bool = True) -> LinearFit:
    """Regress normalised keys on the augmented input; exact when the norm is linear on the calibration text.

    Args:
        source: its `key_norm` is there.
        statistics: with `key_cross`, `attended_key_cross` and `key_energy`.
        constant: whether the map may have a bias.
    """
    norm, everywhere = source.key_norm, statistics.augmented()
    plain_cross, attended_cross, energy = statistics.key_cross, statistics.attended_key_cross, statistics.key_energy
    assert norm is not None and plain_cross is not None and attended_cross is not None and energy is not None
    moment = (everywhere + statistics.augmented_attended()) / 2
    maps = _regress(source.key, norm, (plain_cross + attended_cross) / 2, moment, constant)
    return LinearFit(maps, _left(maps, plain_cross, energy, everywhere))


def fit_queries(source: SourceAttention, statistics: LayerStatistics, *, constant: bool = True) -> LinearFit:
    """Regress normalised queries on the augmented input, as `fit_keys` does keys, or on a normed latent of it.

    Args:
        source: its `query_norm` is there.
        statistics: with `query_cross` and `query_moment`; with `latent_moment` maps are [H, d, R].
    """
    norm, cross, query_moment = source.query_norm, statistics.query_cross, statistics.query_moment
    assert norm is not None and cross is not None and query_moment is not None, "calibration measures them"
    energy = query_moment.diagonal(dim1=1, dim2=2).sum(-1)
    if statistics.latent_moment is not None:
        moment = statistics.latent_moment
        level = RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        maps = torch.linalg.solve(moment + level, cross.mT).mT
        left = energy - 2 * (maps * cross).sum((1, 2)) + torch.einsum("hwx,xy,hwy->h", maps, moment, maps)
        return LinearFit(maps, (left / energy.clamp_min(1e-30)).clamp_min(0.0))
    moment = statistics.augmented()
    maps = _regress(source.query, norm, cross, moment, constant)
    return LinearFit(maps, _left(maps, cross, energy, moment))


def _regress(projection: Tensor, norm: HeadNorm, cross: Tensor, moment: Tensor, constant: bool) -> Tensor:
    """Maps [heads, d, D1] from E[y [x;1]^T] (cross) and E[[x;1] [x;1]^T] (moment), y behind the norm.

    Directions of x that calibration hardly saw are pulled towards the norm with a constant root mean square, c·w·W,
    not towards zero.
    """
    if not constant:
        return F.pad(_regress(projection[..., :-1], norm, cross[..., :-1], moment[:-1, :-1], True), (0, 1))
    linear = projection * norm.weight[:, None]
    scale = (linear * cross).sum((1, 2)) / torch.einsum("hwx,xy,hwy->h", linear, moment, linear).clamp_min(1e-30)
    prior = scale[:, None, None] * linear
    ridge = RIDGE * moment.diagonal().mean()
    damped = moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return prior + torch.linalg.solve(damped, (cross - prior @ moment).mT).mT


def _left(maps: Tensor, cross: Tensor, energy: Tensor, moment: Tensor) -> Tensor:
    """1 - R² of every head. energy: E|y|², [heads]; cross: E[y [x;1]^T]; moment: E[[x;1] [x;1]^T]."""
    left = energy - 2 * (maps * cross).sum((1, 2)) + torch.einsum("hwx,xy,hwy->h", maps, moment, maps)
    variance = energy - cross[..., -1].square().sum(1)
    return (left / variance.clamp_min(1e-30)).clamp_min(0.0)


def with_linear_keys(source: SourceAttention, fit: LinearFit) -> SourceAttention:
    """The same attention with the norm of its keys and the projection before it replaced by the fitted map."""
    return replace(source, key=fit.maps, key_norm=None)


def with_linear_queries(source: SourceAttention, fit: LinearFit, rank: int | None) -> SourceAttention:
    """The same for queries. rank: of the normed latent that the map reads, or None."""
    latent = None if rank is None else query_latent(source, rank)
    return replace(source, query=fit.maps, query_norm=None, query_latent=latent)


def describe_errors(what: str, errors: list[float]) -> str:
    """One line on what linear `what` (keys, queries) lose. errors: 1 - R² by layer, the mean over heads."""
    by_layer = ", ".join(f"{index}: {100 * error:.1f}" for index, error in enumerate(errors))
    return (
        f"{what} pass a norm and become linear; share of their variance that no linear map explains "
        f"on the calibration text, mean {100 * sum(errors) / len(errors):.1f} %, by layer in %: {by_layer}"
    )
