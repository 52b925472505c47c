"""Everything that can be refused before weights load, in one place."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from transmla.convert.refit import stream_bytes
from transmla.data.sources import check_dataset
from transmla.entries import data_names
from transmla.errors import RecipeError
from transmla.evaluate.require import check_requirements
from transmla.evaluate.tasks import check_tasks
from transmla.export.formats import Format, choose_format
from transmla.families import family_of
from transmla.geometry import MLAGeometry, candidates, derive_geometry
from transmla.hardware import require_disk, resolve_device, resolve_dtype
from transmla.modeling.student import student_config
from transmla.plan import bytes_on_disk, count_parameters
from transmla.preflight_stages import check_stages
from transmla.preflight_write import check_written, check_written_name, kind_of_data
from transmla.recipe import Recipe
from transmla.sources import source_config


@dataclass(frozen=True)
class Prepared:
    """A recipe that passed every check, and what follows from it."""

    recipe: Recipe
    config: PretrainedConfig
    geometry: MLAGeometry
    device: str
    dtype: torch.dtype
    output: Path
    export: Format
    notice: str | None  # what the user should know about the conversion


def prepare(recipe: Recipe, *, exports: bool = True) -> Prepared:
    """Check a recipe against the source's configuration, the data files and the machine.

    Args:
        exports: whether a final checkpoint is to be written.

    Raises:
        RecipeError: the first thing that would fail later.
    """
    device = resolve_device(recipe.device)
    if device == "cuda" and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ and not recipe.dry_run:
        raise RecipeError(
            "device", "several GPUs are visible to one process; use accelerate launch, or set CUDA_VISIBLE_DEVICES=0"
        )
    dtype = resolve_dtype(recipe.dtype, device)
    config = source_config(recipe.model)
    family = family_of(config)
    geometry = derive_geometry(config, recipe.convert)
    if dtype == torch.float16 and recipe.recover:
        raise RecipeError("dtype", "recovery does not train in float16; use float32 or bfloat16")
    student = student_config(config, geometry, family)
    if family.head_norms is not None and recipe.convert.q_lora_rank is not None:
        raise RecipeError("convert.q_lora_rank", "the source's queries pass a norm, which is kept; use null")
    export = choose_format(recipe.export, student, dtype) if exports else Format(student.model_type)
    section = recipe.convert
    for option in candidates(config, section) if exports else []:  # whatever a search chooses must be exportable
        choose_format(recipe.export, student_config(config, derive_geometry(config, option), family), dtype)
    if section.searched and section.calibration.tokens < 2 * section.calibration.max_length:
        raise RecipeError("convert.calibration.tokens", "one window cannot be measured on and judge what is auto; use more")
    _check_data(recipe, config)
    check_stages(recipe, config, device)
    check_tasks(recipe.evaluate, online=not recipe.dry_run)
    check_requirements(recipe)
    output = Path(recipe.output_dir.replace("{name}", recipe.name))
    if not recipe.dry_run:
        missing = bytes_on_disk(recipe, count_parameters(config, geometry), config, dtype) - _already(output)
        require_disk(output, max(missing, 0))
        if section.refit:
            streams = stream_bytes(section.calibration.tokens, config.hidden_size, dtype)
            require_disk(Path(tempfile.gettempdir()), streams, "convert.refit")
    return Prepared(recipe, config, geometry, device, dtype, output, export, family.notice(config))


def _check_data(recipe: Recipe, config: PretrainedConfig) -> None:
    used = [("convert.calibration.data", recipe.convert.calibration.data), ("evaluate.data", recipe.evaluate.data)]
    used += [(f"recover.{index}.data", stage.data) for index, stage in enumerate(recipe.recover)]
    for key, names in used:
        if not names:
            raise RecipeError(key, "no dataset is named; name at least one")
        for name in data_names(names):
            if name.startswith("@"):
                check_written_name(name, key, recipe)
            else:
                check_dataset(name, key, online=not recipe.dry_run)
        kind_of_data(names, key, recipe)
    check_written(recipe, config.max_position_embeddings)
    limit = config.max_position_embeddings
    lengths = {
        "convert.calibration.max_length": recipe.convert.calibration.max_length,
        "evaluate.max_length": recipe.evaluate.max_length,
    }
    lengths |= {
        f"recover.{index}.trainer.max_length": stage.trainer.get("max_length") or 0
        for index, stage in enumerate(recipe.recover)
    }
    lengths |= {
        f"recover.{index}.prompt_tokens + max_new_tokens": stage.prompt_tokens + stage.max_new_tokens
        for index, stage in enumerate(recipe.recover)
        if stage.kind == "on_policy"
    }
    for key, length in lengths.items():
        if length > limit:
            raise RecipeError(key, f"{length} is above the {limit} positions of the model; lower it")


def _already(output: Path) -> int:
    return sum(file.stat().st_size for file in output.rglob("*.safetensors")) if output.is_dir() else 0
