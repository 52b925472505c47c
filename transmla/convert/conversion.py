"""The conversion of a whole model: calibrate once, solve every layer, assemble the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from transmla.convert.calibration import LayerStatistics, calibrate
from transmla.convert.closed_form import closed_form_weights
from transmla.convert.key_norm import describe_key_errors, fit_keys, with_linear_keys
from transmla.convert.latent_norm import norm_weights
from transmla.convert.refit import refit_outputs
from transmla.convert.router_calibration import (
    RouterFit,
    describe_routers,
    measure_routers,
    observed,
    router_moments,
)
from transmla.convert.search import search, split
from transmla.families import Family, SourceAttention, family_of
from transmla.families.family import SourceModule
from transmla.families.student_config import student_config
from transmla.families.students import build_student
from transmla.geometry import MLAGeometry, derive_geometry
from transmla.geometry.rotary import describe_stock_rope
from transmla.modeling.student import ATTENTION
from transmla.recipe.schema import Convert

SOLVED_TOGETHER = 4  # layers, on a GPU


@dataclass(kw_only=True)
class Findings:
    """What a conversion found besides weights.

    settings, geometry: with what a search chose. choices: a line for each decision of a search. output_scales: E|o|² of
    every attention of the source. key_errors: by layer, the mean share of the keys' variance that no linear map
    explains; empty where keys pass no norm. routers: by layer, what an export needs to write them as DeepSeek's; empty
    where they stay as they are.
    """

    settings: Convert
    geometry: MLAGeometry
    choices: list[str]
    output_scales: list[float]
    key_errors: list[float]
    routers: list[RouterFit]

    def describe(self) -> dict[str, Any]:
        """What an artifact keeps of it: dimensions, choices, what linear keys lose, and sigmoids for a softmax."""
        kept: dict[str, Any] = {"geometry": self.geometry.describe(), "choices": self.choices}
        kept |= {"key_regression_error": self.key_errors} if self.key_errors else {}
        return kept | ({"router_error": [fit.describe() for fit in self.routers]} if self.routers else {})

    def notes(self) -> list[str]:
        """Sentences for the user."""
        rope = self.geometry.stock_rope
        notes = self.choices + ([f"rotation: {describe_stock_rope(rope)}"] if rope else [])
        notes += [describe_key_errors(self.key_errors)] if self.key_errors else []
        routers = [fit.describe() for fit in self.routers]
        return notes + ([f"router: {describe_routers(routers)}"] if routers else [])

    @property
    def router_shifts(self) -> Tensor | None:
        """By layer, what an export shifts a router's logits by: [2, layers, D], float64; see `RouterShift`."""
        if not self.routers:
            return None
        shifts = [fit.shift for fit in self.routers]
        both = [[shift.one for shift in shifts], [shift.largest for shift in shifts]]
        return torch.stack([torch.stack(rows) for rows in both]).cpu()


@dataclass(kw_only=True)
class Conversion(Findings):
    """A conversion before any measurement.

    student: in the source's dtype and on its device. statistics: by layer. fitted_on: the windows that moments and
    refit saw, [n, L].
    """

    student: PreTrainedModel
    statistics: list[LayerStatistics]
    fitted_on: Tensor


def convert_model(source: PreTrainedModel, settings: Convert, windows: Tensor) -> Conversion:
    """Turn a GQA model into an MLA student that shares its trunk.

    Args:
        windows: calibration tokens, [n, L]. Where something is `auto`, an eighth (at most 8,192 tokens) is held out to
            choose by.
    """
    windows, held_out = split(windows, settings)
    batches = windows.split(settings.calibration.batch_size)
    layers = range(len(source.model.layers)) if settings.router == "stock" else ()
    moments = router_moments(source, layers, source.device) if layers else {}
    with observed(moments):
        statistics = calibrate(source, batches, length=windows.shape[1], total=len(batches))
    routers = measure_routers(source, moments, batches, len(batches)) if layers else []
    choices: list[str] = []
    geometry = derive_geometry(source.config, settings)
    if held_out is not None:
        settings, geometry, choices = search(
            source,
            settings,
            statistics,
            held_out,
            lambda tried, shape: assemble_student(source, shape, tried, statistics),
        )
    student = assemble_student(source, geometry, settings, statistics)
    if settings.refit:
        refit_model(source, student, settings, windows)
    errors = [layer.key_error for layer in statistics if layer.key_error is not None]
    return Conversion(
        student=student,
        settings=settings,
        geometry=geometry,
        statistics=statistics,
        choices=choices,
        fitted_on=windows,
        output_scales=[layer.output_mean_square for layer in statistics],
        key_errors=[float(error.mean()) for error in errors],
        routers=routers,
    )


def refit_model(source: PreTrainedModel, student: PreTrainedModel, settings: Convert, windows: Tensor) -> None:
    """Refit the student's output projections in place (transmla.convert.refit)."""
    drift = drift_of(source.config, settings)
    refit_outputs(source, student, windows, batch_size=settings.calibration.batch_size, drift=drift)


def drift_of(config: PretrainedConfig, settings: Convert) -> float:
    """The share of the drift that a refit takes back: none where the source puts a norm behind its attention."""
    return settings.drift if family_of(config).plain_residual else 0.0


@torch.no_grad()
def assemble_student(
    source: PreTrainedModel, geometry: MLAGeometry, settings: Convert, statistics: list[LayerStatistics]
) -> PreTrainedModel:
    """Solve every layer from given statistics and assemble the student.

    Keys behind a norm become linear maps first; the share of their variance that is lost is set in the statistics.
    """
    family = family_of(source.config)
    config = student_config(source.config, geometry, family)
    attention: dict[str, Tensor] = {}
    layers = source.model.layers

    def solve(index: int) -> dict[str, Tensor]:
        weights = linear_attention(family, layers[index].self_attn, source.config, statistics[index], source.device)
        frequencies = family.frequencies(source, index).double()
        solved = solve_attention(
            weights, statistics[index], frequencies, geometry, settings, config, freqfold=geometry.freqfold_of(index)
        )
        prefix = f"model.layers.{index}{ATTENTION}"
        return {f"{prefix}{name}": value.to(source.dtype) for name, value in solved.items()}

    for found in tqdm(
        _side_by_side(solve, len(layers), source.device), total=len(layers), desc="convert", unit="layer"
    ):
        attention |= found
    return build_student(source, geometry, family, attention)


def _side_by_side(
    solve: Callable[[int], dict[str, Tensor]], count: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """What `solve` gives for every layer, in order; on a GPU several at a time, since eigenvectors of one matrix leave
    most of it idle."""
    if device.type != "cuda":
        yield from map(solve, range(count))
        return
    torch.linalg.eigh(torch.ones(1, 1, device=device))  # loads its library, which only one thread may do
    torch.cuda.current_stream(device).synchronize()  # the streams below do not wait for it

    def by_itself(index: int) -> dict[str, Tensor]:
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            found = solve(index)
            torch.cuda.current_stream(device).synchronize()
        return found

    with ThreadPoolExecutor(SOLVED_TOGETHER) as workers:
        yield from workers.map(by_itself, range(count))


def linear_attention(
    family: Family, module: SourceModule, config: PretrainedConfig, statistics: LayerStatistics, device: torch.device
) -> SourceAttention:
    """The linear maps of one source attention. Keys behind a norm become linear first; the share of their variance that
    is lost is set in the statistics."""
    weights = family.read_attention(module, config, device)
    if weights.key_norm is None:
        return weights
    fit = fit_keys(weights, statistics)
    statistics.key_error = fit.error
    return with_linear_keys(weights, fit)


def solve_attention(
    weights: SourceAttention,
    statistics: LayerStatistics,
    frequencies: Tensor,
    geometry: MLAGeometry,
    settings: Convert,
    student: PretrainedConfig,
    *,
    freqfold: int,
) -> dict[str, Tensor]:
    """State dict of one student attention in float64, without the biases that the student does not have.

    Args:
        weights: as `linear_attention` gives them. frequencies: [d/2], of this layer. student: its configuration.
    """
    solved = closed_form_weights(weights, statistics, frequencies, geometry, settings, freqfold=freqfold)
    if geometry.latent_norm:
        solved |= norm_weights(solved, statistics.augmented(), geometry.kv_lora_rank)
    idle = [name for name in solved if name.endswith(".bias") and not _has_bias(student, name)]
    for name in idle:
        assert not solved[name].any(), f"{name} is not zero, yet the student has no such bias"
    return {name: value for name, value in solved.items() if name not in idle}


def _has_bias(config: PretrainedConfig, name: str) -> bool:
    return config.mla_output_bias if name == "o_proj.bias" else config.mla_qkv_bias
