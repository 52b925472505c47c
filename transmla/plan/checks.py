"""Everything that can be refused before weights load, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.export.formats import Format
from transmla.geometry import MLAGeometry
from transmla.hardware import resolve_device, resolve_dtype
from transmla.plan.budget_checks import check_budgets
from transmla.plan.conversion_checks import check_conversion
from transmla.plan.data_checks import check_data
from transmla.plan.determinism_checks import check_determinism
from transmla.plan.disk import check_disk
from transmla.plan.evaluation_checks import check_evaluation
from transmla.plan.export_checks import check_export
from transmla.plan.launch_checks import check_launch, check_launch_file
from transmla.plan.memory import Sizes, count_parameters
from transmla.plan.model_facts import check_facts_of_recipe
from transmla.plan.output_folder import check_output_folder, output_folder
from transmla.plan.stage_checks import check_stages
from transmla.plan.streaming_choice import Streaming, choose_streamed_evaluation, choose_streaming
from transmla.recipe.schema import Recipe


@dataclass(frozen=True)
class Prepared:
    """A recipe that passed every check, and what follows from it."""

    recipe: Recipe
    config: PretrainedConfig
    geometry: MLAGeometry
    sizes: Sizes
    device: str
    dtype: torch.dtype
    output: Path
    export: Format
    streaming: Streaming  # whether the conversion reads its source layer by layer
    evaluation: Streaming  # whether models are evaluated layer by layer
    notice: str | None  # what the user should know about the conversion
    replaced: list[str]  # what `deterministic` does otherwise than the recipe says, a line for each key
    kinds: dict[str, str]  # what the rows of each `data` list are, by key: text, messages or completion


def prepare(recipe: Recipe, *, exports: bool = True, text: bool = True) -> Prepared:
    """Check a recipe against the machine, the source's configuration and the data files.

    Args:
        exports: whether a final checkpoint is to be written.
        text: whether the recipe's text is to be read, and anything made of it kept.

    Raises:
        RecipeError: the first thing that would fail later.
    """
    check_launch_file()
    device = resolve_device(recipe.device)
    if device == "cuda" and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ and not recipe.dry_run:
        raise RecipeError(
            "device", "several GPUs are visible to one process; use accelerate launch, or set CUDA_VISIBLE_DEVICES=0"
        )
    dtype = resolve_dtype(recipe.dtype, device)
    check_launch(recipe, device, str(dtype).removeprefix("torch."))
    check_facts_of_recipe(recipe)
    found = check_conversion(recipe, dtype, exports=exports)
    sizes = count_parameters(found.config, found.student)
    streaming = choose_streaming(recipe, found.config, sizes, dtype, device)
    evaluation = choose_streamed_evaluation(recipe, found.config, sizes, dtype, device)
    kinds = check_data(recipe, found.config.max_position_embeddings) if text else {}
    check_stages(recipe, found.config, device, dtype, kinds)
    replaced = check_determinism(recipe, found.config, found.geometry, device, dtype)
    check_budgets(recipe, found.config, sizes, found.geometry.source_cache, device, streaming.on)
    if text:
        check_evaluation(recipe, found.config.max_position_embeddings)
    if exports and not recipe.dry_run:
        check_export(recipe, sizes, found.config)
    output = output_folder(recipe)
    if not recipe.dry_run:
        check_output_folder(output)
        if text:
            check_disk(recipe, sizes, found.config, dtype, output, streamed=streaming.on)
    return Prepared(
        recipe=recipe,
        config=found.config,
        geometry=found.geometry,
        sizes=sizes,
        device=device,
        dtype=dtype,
        output=output,
        export=found.export,
        streaming=streaming,
        evaluation=evaluation,
        notice=found.notice,
        replaced=replaced,
        kinds=kinds,
    )
