"""Everything that can be refused before weights load, in one place.

What is quick to see comes first: transformers' model code and trl take seconds to import, and nobody waits for them to
read that a file is not there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transmla.errors import RecipeError
from transmla.plan.data_checks import check_data, check_lengths
from transmla.plan.launch_checks import check_launch, check_launch_file
from transmla.plan.output_folder import check_output_folder, output_folder
from transmla.recipe.schema import Recipe
from transmla.sources.config_file import read_config_file
from transmla.sources.kinds import check_there, kind_of
from transmla.sources.weight_files import check_headers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from transmla.export.formats import Format
    from transmla.geometry import MLAGeometry
    from transmla.plan.conversion_checks import ConversionPlan
    from transmla.plan.memory import Sizes
    from transmla.plan.streaming_choice import Streaming


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
    """Check a recipe against the machine, the data files and the source.

    Args:
        exports: whether a final checkpoint is to be written.
        text: whether the recipe's text is to be read, and anything made of it kept.

    Raises:
        RecipeError: the first thing that would fail later.
    """
    check_launch_file()
    _check_folders(recipe)
    kinds = check_data(recipe) if text else {}
    device, dtype, found = _check_configuration(recipe, kinds, exports=exports, text=text)
    from transmla.sources.check import check_architecture

    check_architecture(recipe.model, found.config, "model")  # transformers' model code
    from transmla.plan.model_checks import check_models  # trl

    return check_models(recipe, found, device, dtype, kinds, exports=exports, text=text)


def _check_folders(recipe: Recipe) -> None:
    """The folders that are read and written."""
    check_there(recipe.model.source, "model")
    if kind_of(recipe.model.source) == "directory":
        folder, key = Path(recipe.model.source).expanduser(), "model.source"
        read_config_file(folder, key)
        check_headers(folder, key)
    if not recipe.dry_run:
        check_output_folder(output_folder(recipe))


def _check_configuration(
    recipe: Recipe, kinds: dict[str, str], *, exports: bool, text: bool
) -> tuple[str, torch.dtype, ConversionPlan]:
    """What the source's configuration decides: device, number format, dimensions and lengths."""
    import torch

    from transmla.hardware import resolve_device, resolve_dtype
    from transmla.plan.conversion_checks import check_conversion
    from transmla.plan.evaluation_checks import check_evaluation
    from transmla.plan.model_facts import check_facts_of_recipe
    from transmla.plan.row_checks import check_rows
    from transmla.plan.step_checks import check_steps
    from transmla.sources.generation import read_generation
    from transmla.sources.tokenizer import check_tokenizer

    device = resolve_device(recipe.device)
    if device == "cuda" and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ and not recipe.dry_run:
        raise RecipeError(
            "device", "several GPUs are visible to one process; use accelerate launch, or set CUDA_VISIBLE_DEVICES=0"
        )
    dtype = resolve_dtype(recipe.dtype, device)
    check_launch(recipe, device, str(dtype).removeprefix("torch."))
    check_facts_of_recipe(recipe)
    found = check_conversion(recipe, dtype, exports=exports)
    if kind_of(recipe.model.source) == "directory":
        folder = Path(recipe.model.source).expanduser()
        read_generation(folder, found.config, "model.source")
        check_tokenizer(folder, "model.source")
    if text:
        check_lengths(recipe, found.config.max_position_embeddings)
        check_rows(recipe, found.config, kinds)  # before steps: long rows are the reason of long steps
        check_evaluation(recipe, found.config.max_position_embeddings)
    check_steps(recipe)
    return device, dtype, found
