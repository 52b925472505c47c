"""What takes the model's classes and trl to see: memory, stages, trainers, disk."""

from __future__ import annotations

import torch

from transmla.plan.budget_checks import check_budgets
from transmla.plan.checks import Prepared
from transmla.plan.conversion_checks import ConversionPlan
from transmla.plan.determinism_checks import check_determinism
from transmla.plan.disk import check_disk
from transmla.plan.export_checks import check_export
from transmla.plan.memory import count_parameters
from transmla.plan.output_folder import output_folder
from transmla.plan.stage_checks import check_stages
from transmla.plan.streaming_choice import choose_streamed_evaluation, choose_streaming
from transmla.recipe.schema import Recipe


def check_models(
    recipe: Recipe,
    found: ConversionPlan,
    device: str,
    dtype: torch.dtype,
    kinds: dict[str, str],
    *,
    exports: bool,
    text: bool,
) -> Prepared:
    """Check a recipe whose data and dimensions are good.

    Args:
        found: what follows from the source's configuration. kinds: of the rows of every list of data, by key.
        exports, text: as in `transmla.plan.checks.prepare`.

    Raises:
        RecipeError: the first thing that would fail later.
    """
    sizes = count_parameters(found.config, found.student)
    streaming = choose_streaming(recipe, found.config, sizes, dtype, device)
    evaluation = choose_streamed_evaluation(recipe, found.config, sizes, dtype, device)
    check_stages(recipe, found.config, device, dtype)
    replaced = check_determinism(recipe, found.config, found.geometry, device, dtype)
    check_budgets(recipe, found.config, sizes, found.geometry.source_cache, device, streaming.on)
    if exports and not recipe.dry_run:
        check_export(recipe, sizes, found.config)
    output = output_folder(recipe)
    if not recipe.dry_run and text:
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
