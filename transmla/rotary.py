"""Rotary frequencies of sources, and the stock rotary embedding that is nearest to a scaled one.

Every engine of DeepSeek's models knows two embeddings, `default` and `yarn` with mscale = mscale_all_dim = 1. Dimension
P of the latter turns channel n = 0 .. P/2 - 1 at

    theta^(-2n/P) (1 - r_n + r_n / factor),     r_n = clamp((n - low) / (high - low), 0, 1)

with whole numbers 0 <= low < high that beta_fast, beta_slow and original_max_position_embeddings stand for. llama3 has
the same two ends, unchanged fast channels and slow ones divided by its factor, but another ramp between them: the few
channels on it differ. Linear scaling divides all frequencies by f, and channel 0 of YaRN always turns at 1. With
channel 0 left idle and factor f theta^(-2/P), channels 1, 2, ... turn exactly as the source's 0, 1, ... do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from transmla.errors import RecipeError

SCALED = ("llama3", "linear")  # kinds that a stock embedding is found for
BOUND = (
    1 / 64
)  # how far from a whole number the bounds of a ramp lie: times 64 / P, in a padded rope head, still below 1
DISTANCES = 200  # at which phases are compared


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


def stock_rope(config: PretrainedConfig, head_dim: int, collapse: int, rope: int) -> dict[str, Any]:
    """What `StockRope` says of the stock embedding for `rope` coordinates at every `collapse`th source frequency."""
    scaled = config.rope_parameters
    wanted = source_frequencies(scaled, head_dim)[::collapse][: rope // 2]
    theta = scaled["rope_theta"] ** (collapse * rope / head_dim)
    return nearest_stock_rope(scaled, theta, rope, wanted, config.max_position_embeddings).describe()


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

    low = max(math.floor(channel(parameters["beta_fast"])), 0)
    high = min(math.ceil(channel(parameters["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)).clamp(0, 1)
    found = default_frequencies(base, dim)
    return found * (1 - ramp + ramp / parameters["factor"])


def logit_factor(parameters: dict[str, Any]) -> float:
    """What DeepSeek's attention multiplies logits by for its YaRN, and the student's does not."""
    if parameters.get("rope_type") != "yarn":
        return 1.0
    return (0.1 * parameters["mscale_all_dim"] * math.log(parameters["factor"]) + 1.0) ** 2


@dataclass(frozen=True)
class StockRope:
    """The stock embedding in the place of a scaled one.

    parameters: as `rope_parameters`. idle: channels in front that nothing of the source turns with. error: for each of
    the other channels, how much faster than the source's it turns, as a share. cost: what the choice was made by.
    """

    parameters: dict[str, Any]
    idle: int
    error: tuple[float, ...]
    cost: float

    def describe(self) -> dict[str, Any]:
        """For a geometry, and with it a report."""
        wrong = [error for error in self.error if abs(error) > 1e-9]
        return {
            "parameters": self.parameters,
            "idle_channels": self.idle,
            "channels": len(self.error),
            "channels_changed": len(wrong),
            "largest_error": max(map(abs, wrong), default=0.0),
        }


def describe_stock_rope(found: dict[str, Any]) -> str:
    """One sentence on what `StockRope.describe` gives, for a plan and a report."""
    kind, changed = found["parameters"]["rope_type"], found["channels_changed"]
    idle = f", and {found['idle_channels']} is idle" if found["idle_channels"] else ""
    if not changed:
        return f"{kind}: {found['channels']} channels turn exactly as the source's do{idle}"
    return (
        f"{kind}: {found['channels'] - changed} channels turn as the source's do, {changed} differ by at most "
        f"{100 * found['largest_error']:.0f} % of the frequency{idle}"
    )


def nearest_stock_rope(
    scaled: dict[str, Any], theta: float, dim: int, frequencies: Tensor, positions: int
) -> StockRope:
    """The stock embedding of dimension `dim` whose phases are nearest to those of the wanted frequencies.

    Minimises the mean over channels and distances (log-uniform up to `positions`) of |exp(iΔω) - exp(iΔω')|², where a
    frequency that finds no channel counts with ω' = 0.

    Args:
        scaled: `rope_parameters` of the source. theta: base of the unscaled frequencies in dimension `dim`.
        frequencies: [dim/2], wanted. positions: max_position_embeddings.
    """
    channels = dim // 2
    plain = default_frequencies(theta, dim)
    steps = torch.exp(torch.linspace(0.0, math.log(max(2, positions)), DISTANCES, dtype=torch.float64))
    found = []
    for idle, base, ramp, factor in _candidates(scaled, theta, dim, frequencies / plain):
        if ramp is None:
            parameters, given = {"rope_type": "default", "rope_theta": base}, default_frequencies(base, dim)
        else:
            parameters = _yarn(base, factor, *ramp, dim=dim, positions=positions)
            given = yarn_frequencies(parameters, dim)
        turned = torch.cat((given[idle:], given.new_zeros(idle)))
        cost = float((2 - 2 * torch.cos(torch.outer(steps, frequencies - turned))).mean())
        error = given[idle:] / frequencies[: channels - idle] - 1
        found.append(StockRope(parameters, idle, tuple(error.tolist()), cost))
    return min(found, key=lambda option: option.cost)


def _candidates(
    scaled: dict[str, Any], theta: float, dim: int, ratio: Tensor
) -> Iterator[tuple[int, float, tuple[int, int] | None, float]]:
    """Idle channels, base, bounds of the ramp (None: `default`) and factor of every embedding that is tried.

    ratio: [dim/2], of wanted to unscaled frequencies.
    """
    factor = float(scaled["factor"])
    yield 0, theta, None, factor
    if scaled["rope_type"] == "linear":
        yield 0, theta, (0, 1), factor
        behind = factor * theta ** (-2 / dim)
        if dim > 2 and behind >= 1:
            yield 1, theta, (0, 1), behind
        elif dim > 2 and factor > 1:  # YaRN does not make frequencies larger
            yield 1, theta, None, factor
            yield 1, factor ** (dim / 2), None, factor  # channel 1 exact
        return
    first = int((ratio > 1 - 1e-9).sum())  # of the channels that are scaled, and of those that are divided
    last = dim // 2 - int((ratio < (1 + 1e-9) / factor).sum())
    for low in range(max(0, first - 3), last + 1):
        for high in range(low + 1, min(last + 4, dim)):
            yield 0, theta, (low, high), factor


def _yarn(theta: float, factor: float, low: int, high: int, *, dim: int, positions: int) -> dict[str, Any]:
    """`rope_parameters` of the YaRN with these bounds: in this dimension, and in 64 where every (64 / dim)th channel is
    used.

    Engines hold factor · original_max_position_embeddings angles, and transformers warns where that is not
    max_position_embeddings, or the original itself.
    """
    original = positions / factor
    original = int(original) if original.is_integer() else positions

    def turns(channel: float) -> float:
        return original / (2 * math.pi) * theta ** (-2 * channel / dim)

    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": turns(low + BOUND),
        "beta_slow": turns(high - BOUND),
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
