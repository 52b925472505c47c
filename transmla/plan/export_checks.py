"""What can be refused of the export's check before weights load: memory that the machine does not have."""

from __future__ import annotations

import psutil
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.export.reload_check import memory_of_check
from transmla.plan.memory import Sizes
from transmla.recipe.schema import Recipe


def check_export(recipe: Recipe, sizes: Sizes, config: PretrainedConfig) -> None:
    """Check that the machine could hold what the reload check of the export needs.

    Raises:
        RecipeError: it could not, whatever else is running.
    """
    needed = memory_of_check(recipe.export.verify, sizes.student, config, by_module=True)
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    if there < needed:
        raise RecipeError(
            "export.verify",
            f"the check of the export takes {needed / 2**30:.1f} GiB of memory for {recipe.export.verify.tokens:,} "
            f"tokens, even where weights are read when they are needed, the machine has {there / 2**30:.1f}; lower "
            "export.verify.tokens or use another machine",
        )
