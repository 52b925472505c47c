"""Rotary frequencies of sources, and stock rotary embeddings in the place of scaled ones.

Engines with a DeepSeek class of their own know two embeddings, `default` and `yarn`. A rope head is free to take any
frequencies of the source: here every source frequency goes to the channel that turns most like it.

- llama3 leaves fast frequencies as they are and divides slow ones by a factor. Unscaled channels at the source's base
  have the fast ones exactly, and others near all that are slower.
- linear divides all by f. Dimension P of YaRN, once its ramp ends at channel 1, turns channel 0 at 1 and channel n at
  theta^(-2n/P) / factor: with factor f theta^(-2/P) channels 1, 2, ... turn exactly as the source's 0, 1, ... do, and
  channel 0 is idle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from transmla.errors import RecipeError

SCALED = ("llama3", "linear")  # kinds that a stock embedding is found for
BELOW_EVERY_RAMP = 6  # positions below 2 pi, which nothing turns in: YaRN divides every frequency but the first
BOUND = 1 / 128  # channels from 0 to both ends of a ramp: 64 / P times that, in a padded rope head, is below 1 too


@dataclass(frozen=True)
class Band:
    """Neighbouring source frequencies [start, stop), and the channels of the rope head for their leading components."""

    start: int
    stop: int
    channels: tuple[int, ...]


def natural_bands(freqfold: int, collapse: int, channels: int) -> list[Band]:
    """Bands of `freqfold` frequencies with `freqfold / collapse` channels each, channel m at frequency `collapse * m`;
    the last band has what is left of the channels."""
    found = []
    for start in range(0, collapse * channels, freqfold):
        stop = min(start + freqfold, collapse * channels)
        found.append(Band(start, stop, tuple(range(start // collapse, stop // collapse))))
    return found


def rope_types(config: PretrainedConfig) -> set[str]:
    """Kinds of rotary embedding in a configuration, whose parameters may differ by layer type."""
    parameters = config.rope_parameters or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]
    return {entry.get("rope_type", "default") for entry in by_layer or [parameters]}


def has_nearest(config: PretrainedConfig) -> bool:
    """Whether a stock embedding has to be found for a source; an unscaled one is stock already.

    Raises:
        RecipeError: none can be.
    """
    if any(isinstance(value, dict) for value in (config.rope_parameters or {}).values()):
        raise RecipeError(
            "convert.rope",
            "the source has a rotary embedding for each kind of layer, a stock checkpoint one for all; use keep",
        )
    return bool(rope_types(config) & set(SCALED))


def default_frequencies(theta: float, dim: int) -> Tensor:
    """[dim/2] radians a position of an unscaled embedding, in float64."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def source_frequencies(parameters: dict[str, Any], dim: int) -> Tensor:
    """[dim/2] radians a position of a `default`, `linear` or `llama3` embedding, in float64."""
    found = default_frequencies(parameters["rope_theta"], dim)
    if parameters["rope_type"] == "linear":
        return found / parameters["factor"]
    if parameters["rope_type"] == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        turns = found * parameters["original_max_position_embeddings"] / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns > low).to(found)
        return found * (kept + (1 - kept) / parameters["factor"])
    return found


def yarn_frequencies(parameters: dict[str, Any], dim: int) -> Tensor:
    """[dim/2] radians a position of DeepSeek's YaRN, in float64."""
    base, positions = parameters["rope_theta"], parameters["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        return dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(channel(parameters.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(channel(parameters.get("beta_slow") or 1.0)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)).clamp(0, 1)
    return default_frequencies(base, dim) * (1 - ramp + ramp / parameters["factor"])


def embedding_frequencies(parameters: dict[str, Any], dim: int) -> Tensor:
    """[dim/2] radians a position of any embedding that a student has, in float64."""
    return (yarn_frequencies if parameters["rope_type"] == "yarn" else source_frequencies)(parameters, dim)


def context_for_fixed_betas(parameters: dict[str, Any], dim: int) -> int | None:
    """The original_max_position_embeddings with which a YaRN has its frequencies under betas of 32 and 1 too, as
    llama.cpp takes them for DeepSeek's models whatever a file says; None: there is none."""
    fixed = {name: value for name, value in parameters.items() if not name.startswith("beta")}
    wanted = yarn_frequencies(parameters, dim)
    for context in (parameters["original_max_position_embeddings"], BELOW_EVERY_RAMP):
        found = yarn_frequencies(fixed | {"original_max_position_embeddings": context}, dim)
        if torch.allclose(found, wanted, rtol=1e-9, atol=0):
            return context
    return None


def logit_factor(parameters: dict[str, Any]) -> float:
    """What DeepSeek's attention multiplies logits by for its YaRN, and the student's does not."""
    if parameters.get("rope_type") != "yarn":
        return 1.0
    return (0.1 * parameters["mscale_all_dim"] * math.log(parameters["factor"]) + 1.0) ** 2


def stock_rope(config: PretrainedConfig, head_dim: int, collapse: int, rope: int) -> dict[str, Any]:
    """The stock embedding of `rope` dimensions for a scaled source, as a record that a report can keep.

    As without it, `collapse` neighbouring source frequencies go together, and the first of them decides where.

    Returns:
        `parameters`, as `rope_parameters` of the student; `bands`, each [start, stop, channels], the first channel the
        nearest; `exact`, how many of these turn exactly at a deciding frequency; `largest_error`, of the others, as a
        share of the nearest deciding one; `idle`, channels in no band; `lost`, source frequencies in none.
    """
    scaled, channels = config.rope_parameters, rope // 2
    wanted = source_frequencies(scaled, head_dim)[: collapse * channels : collapse]
    theta, step = (scaled["rope_theta"] ** (collapse * size / head_dim) for size in (rope, 2))
    if scaled["rope_type"] == "linear" and scaled["factor"] >= step and channels > 1:
        parameters = _stepped_yarn(theta, scaled["factor"] / step, rope, config.max_position_embeddings)
        given = yarn_frequencies(parameters, rope)
        found = [Band(index, index + 1, (index + 1,)) for index in range(channels - 1)]
    else:
        parameters, given = {"rope_type": "default", "rope_theta": theta}, default_frequencies(theta, rope)
        found = _nearest_bands(wanted, given)
    errors = [float((given[band.channels[0]] / wanted[band.start : band.stop] - 1).abs().min()) for band in found]
    wrong = [error for error in errors if error > 1e-9]
    return {
        "parameters": parameters,
        "bands": [[collapse * band.start, collapse * band.stop, list(band.channels)] for band in found],
        "exact": len(errors) - len(wrong),
        "largest_error": max(wrong, default=0.0),
        "idle": channels - sum(len(band.channels) for band in found),
        "lost": head_dim // 2 - collapse * sum(band.stop - band.start for band in found),
    }


def describe_stock_rope(found: dict[str, Any]) -> str:
    """One sentence on what `stock_rope` returns, for a plan and a report."""
    bands, exact = len(found["bands"]), found["exact"]
    more = sum(len(channels) for _, _, channels in found["bands"]) - bands
    error = f"{bands - exact} within {100 * found['largest_error']:.0f} %" if bands > exact else ""
    turn = "1 channel turns" if exact == 1 else f"{exact} channels turn"
    parts = [f"{turn} exactly as frequencies of the source do", error]
    parts += [f"{more} share those of a neighbour" if more else "", f"{found['idle']} idle" if found["idle"] else ""]
    return f"{found['parameters']['rope_type']}: {', '.join(part for part in parts if part)}"


def stock_bands(found: dict[str, Any], fold: int) -> list[Band]:
    """The bands of what `stock_rope` returns, `fold` neighbouring ones joined."""
    bands = found["bands"]
    joined = [bands[first : first + fold] for first in range(0, len(bands), fold)]
    return [
        Band(group[0][0], group[-1][1], tuple(channel for band in group for channel in band[2])) for group in joined
    ]


def _nearest_bands(wanted: Tensor, given: Tensor) -> list[Band]:
    """Every wanted frequency with the given one that is nearest, where that is nearer than no rotation; then channels
    that nothing is nearest to, with the frequencies that are nearest to them. Both descend."""
    own, distance = (wanted[:, None] - given).abs().argmin(dim=1), (wanted[:, None] - given).abs()
    near = distance < wanted[:, None]
    members = {
        channel: [index for index in range(len(wanted)) if own[index] == channel and near[index, channel]]
        for channel in range(len(given))
    }
    taken = {channel: [channel] for channel, indices in members.items() if indices}
    for channel in members.keys() - taken.keys():
        nearest = int(distance[:, channel].argmin())
        if near[nearest, channel] and near[nearest, own[nearest]]:
            taken[int(own[nearest])].append(channel)
    return [Band(members[channel][0], members[channel][-1] + 1, tuple(taken[channel])) for channel in sorted(taken)]


def _stepped_yarn(theta: float, factor: float, dim: int, positions: int) -> dict[str, Any]:
    """`rope_parameters` of the YaRN that divides every frequency but the first.

    Engines hold factor · original_max_position_embeddings angles; transformers warns where that is not
    max_position_embeddings, or the original itself.
    """
    original = positions / factor
    original = int(original) if original.is_integer() else positions
    turns = original / (2 * math.pi) * theta ** (-2 * BOUND / dim)
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": turns,
        "beta_slow": turns,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
