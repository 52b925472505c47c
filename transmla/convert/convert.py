"""The conversion of a whole model: calibrate once, solve every layer, assemble the student."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from transmla.convert.calibration import LayerStatistics, calibrate
from transmla.convert.keynorm import fit_keys, with_linear_keys
from transmla.convert.latent_norm import norm_weights
from transmla.convert.solve import solve_attention
from transmla.families import family_of
from transmla.geometry import MLAGeometry
from transmla.modeling.student import build_student, student_config
from transmla.recipe import Convert


def convert_model(
    source: PreTrainedModel,
    geometry: MLAGeometry,
    settings: Convert,
    windows: Iterable[Tensor],
    *,
    batches: int | None = None,
) -> tuple[PreTrainedModel, list[LayerStatistics]]:
    """Turn a GQA model into an MLA student that shares its trunk.

    Args:
        windows: batches of calibration tokens [B, T]. batches: their number, for the progress bar.

    Returns:
        The student, in the source's dtype and on its device, and the statistics of every layer.
    """
    statistics = calibrate(source, windows, length=settings.calibration.max_length, total=batches)
    return solve_model(source, geometry, settings, statistics), statistics


@torch.no_grad()
def solve_model(
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
        solved = solve_attention(weights, statistics[index], frequencies, geometry, settings)
        if geometry.latent_norm:
            solved |= norm_weights(solved, statistics[index].augmented(), geometry.kv_lora_rank)
        for name, value in solved.items():
            if name.endswith(".bias") and not _has_bias(config, name):
                assert not value.any(), f"layer {index}: {name} is not zero, yet the student has no such bias"
                continue
            attention[f"model.layers.{index}.self_attn.{name}"] = value.to(source.dtype)
    return build_student(source, geometry, family, attention)


def _has_bias(config: object, name: str) -> bool:
    return config.mla_output_bias if name == "o_proj.bias" else config.mla_qkv_bias
