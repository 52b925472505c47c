"""The conversion of a whole model: calibrate once, solve every layer, assemble the student."""

from __future__ import annotations

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
from transmla.convert.search import search, split
from transmla.families import family_of
from transmla.families.student_config import build_student, student_config
from transmla.geometry import MLAGeometry, derive_geometry
from transmla.recipe.schema import Convert


@dataclass
class Conversion:
    """A conversion before any measurement.

    student: in the source's dtype and on its device. settings, geometry: with what a search chose. statistics: by
    layer. choices: a line for each decision of a search. fitted_on: the windows that moments and refit saw, [n, L].
    """

    student: PreTrainedModel
    settings: Convert
    geometry: MLAGeometry
    statistics: list[LayerStatistics]
    choices: list[str]
    fitted_on: Tensor

    def describe(self) -> dict[str, Any]:
        """What an artifact keeps of it: dimensions, choices, and what linear keys lose."""
        kept: dict[str, Any] = {"geometry": self.geometry.describe(), "choices": self.choices}
        errors = [layer.key_error for layer in self.statistics if layer.key_error is not None]
        if errors:
            kept["key_regression_error"] = [float(error.mean()) for error in errors]
        return kept

    def notes(self) -> list[str]:
        """Sentences for the user."""
        errors = self.describe().get("key_regression_error")
        return self.choices + ([describe_key_errors(errors)] if errors else [])

    @property
    def output_scales(self) -> list[float]:
        """E|o|² of every attention of the source."""
        return [layer.output_mean_square for layer in self.statistics]


def convert_model(source: PreTrainedModel, settings: Convert, windows: Tensor) -> Conversion:
    """Turn a GQA model into an MLA student that shares its trunk.

    Args:
        windows: calibration tokens, [n, L]. Where something is `auto`, an eighth (at most 8,192 tokens) is held out to
            choose by.
    """
    windows, held_out = split(windows, settings)
    batches = windows.split(settings.calibration.batch_size)
    statistics = calibrate(source, batches, length=windows.shape[1], total=len(batches))
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
    return Conversion(student, settings, geometry, statistics, choices, windows)


def refit_model(source: PreTrainedModel, student: PreTrainedModel, settings: Convert, windows: Tensor) -> None:
    """Refit the student's output projections in place (transmla.convert.refit)."""
    drift = settings.drift if family_of(source.config).plain_residual else 0.0
    refit_outputs(source, student, windows, batch_size=settings.calibration.batch_size, drift=drift)


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
    for index, layer in enumerate(tqdm(layers, desc="convert", unit="layer")):
        weights = family.read_attention(layer.self_attn, source.config, source.device)
        if weights.key_norm is not None:
            fit = fit_keys(weights, statistics[index])
            statistics[index].key_error = fit.error
            weights = with_linear_keys(weights, fit)
        frequencies = family.frequencies(source, index).double()
        solved = closed_form_weights(
            weights, statistics[index], frequencies, geometry, settings, freqfold=geometry.freqfold_of(index)
        )
        if geometry.latent_norm:
            solved |= norm_weights(solved, statistics[index].augmented(), geometry.kv_lora_rank)
        for name, value in solved.items():
            if name.endswith(".bias") and not _has_bias(config, name):
                assert not value.any(), f"layer {index}: {name} is not zero, yet the student has no such bias"
                continue
            attention[f"model.layers.{index}.self_attn.{name}"] = value.to(source.dtype)
    return build_student(source, geometry, family, attention)


def _has_bias(config: PretrainedConfig, name: str) -> bool:
    return config.mla_output_bias if name == "o_proj.bias" else config.mla_qkv_bias
