"""Budgets of tokens against one window and one step."""

from __future__ import annotations

import os

from transmla.errors import RecipeError
from transmla.recipe.budget import rows_of_a_step, steps_of, tokens_of_a_step
from transmla.recipe.schema import Recipe

CONTINUATIONS = 10**7  # of an on-policy stage, whose prompts are all in memory


def check_steps(recipe: Recipe) -> None:
    """Check that every budget gives at least one window or step.

    Raises:
        RecipeError: with the least, or the most, that is possible.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for key, section in (("convert.calibration", recipe.convert.calibration), ("evaluate", recipe.evaluate)):
        if section.tokens < section.max_length:
            raise RecipeError(
                f"{key}.tokens",
                f"{section.tokens} are fewer than one window of {section.max_length}; use at least that, or lower "
                f"{key}.max_length",
            )
    for index, stage in enumerate(recipe.recover):
        key, least = f"recover.{index}", tokens_of_a_step(stage, processes)
        if stage.tokens < least:
            raise RecipeError(
                f"{key}.tokens",
                f"{stage.tokens} are fewer than one step, which takes {least:,} (row length x rows x accumulation "
                "steps x processes); use at least that, or smaller rows or batches",
            )
        if stage.kind == "on_policy" and steps_of(stage, processes) * rows_of_a_step(stage) > CONTINUATIONS:
            raise RecipeError(
                f"{key}.tokens", f"it gives more than {CONTINUATIONS:,} continuations per process; use fewer tokens"
            )
