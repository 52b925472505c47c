"""What can be refused of the source, of `convert` and of `export` before weights load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.export.formats import Format, choose_format
from transmla.families import Family, family_of
from transmla.families.student_config import student_config
from transmla.geometry import MLAGeometry, candidates, derive_geometry
from transmla.recipe.schema import Recipe
from transmla.sources.config import source_config


@dataclass(frozen=True)
class ConversionPlan:
    """What follows from the source's configuration.

    student: its configuration. geometry: its dimensions. export: format of the final checkpoint. notice: what the user
    should know.
    """

    config: PretrainedConfig
    student: PretrainedConfig
    geometry: MLAGeometry
    export: Format
    notice: str | None


def check_conversion(recipe: Recipe, dtype: torch.dtype, *, exports: bool) -> ConversionPlan:
    """Check source, dimensions and export against one another.

    Args:
        exports: whether a final checkpoint is to be written.

    Raises:
        RecipeError: the first thing that would fail later.
    """
    section = recipe.convert
    config = source_config(recipe.model)
    family = family_of(config)
    found: list[ConversionPlan] = []
    for option in candidates(config, section):  # whatever a search may choose must be exportable
        geometry = derive_geometry(config, option)
        student = student_config(config, geometry, family)
        export = choose_format(recipe.export, student, dtype) if exports else Format(student.model_type)
        found.append(ConversionPlan(config, student, geometry, export, family.notice(config)))
    if dtype == torch.float16 and recipe.recover:
        raise RecipeError("dtype", "recovery does not train in float16; use float32 or bfloat16")
    if family.head_norms is not None and section.q_lora_rank is not None:
        raise RecipeError("convert.q_lora_rank", "the source's queries pass a norm, which is kept; use null")
    if section.biases == "fold" and family.output_bias(config):
        raise RecipeError(
            "convert.biases",
            "the source has a bias on the attention's output too, which no feature of its input carries, and its "
            "export is the student's own class, which has biases; use keep",
        )
    if section.router == "stock":
        _check_router(config, family)
    calibration = section.calibration
    if section.searched and calibration.tokens < 2 * calibration.max_length:
        raise RecipeError(
            "convert.calibration.tokens", "one window cannot be measured on and judge what is auto; use more"
        )
    return found[0]


def _check_router(config: PretrainedConfig, family: Family) -> None:
    """Check that there are experts which DeepSeek's router can choose.

    Raises:
        RecipeError: there are none.
    """
    if family.router is None:
        raise RecipeError("convert.router", f"a {config.model_type} has no experts to route to; use keep")
    if config.num_local_experts < 2:
        raise RecipeError(
            "convert.router", "DeepSeek's router chooses among two experts at least, this is one; use keep"
        )
