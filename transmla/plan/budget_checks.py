"""What is drawn, or cached of what is written, against the memory that a machine has."""

from __future__ import annotations

import psutil
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.plan.memory import Sizes
from transmla.recipe.schema import Recipe
from transmla.recipe.writing import Sampling
from transmla.sources.kinds import kind_of

LARGEST_GPU = 2**40  # bytes; more than any has


def check_budgets(
    recipe: Recipe, config: PretrainedConfig, sizes: Sizes, cache: int, device: str, streaming: bool
) -> None:
    """Check that nothing outgrows the memory.

    Args:
        config: of the source. cache: values that the source caches per token and layer. streaming: whether the source
            is read layer by layer.

    Raises:
        RecipeError: with the most that is possible.
    """
    for key, entries in (("write", recipe.write), ("evaluate.solve", recipe.evaluate.solve)):
        for index, entry in enumerate(entries):
            _check_sampling(entry, f"{key}.{index}", config.num_hidden_layers * cache, device)
    if kind_of(recipe.model.source) == "random" and not (recipe.dry_run or streaming):
        needed, there = 4 * sizes.source, psutil.virtual_memory().available
        if needed > there:
            raise RecipeError(
                "model.config",
                f"a random model of these sizes takes {needed / 2**30:.1f} GiB, {there / 2**30:.1f} are free; make it "
                "smaller",
            )


def _check_sampling(settings: Sampling, key: str, cached: int, device: str) -> None:
    """What is cached of a batch must fit into the memory that there is. cached: values per token, 2 bytes at least."""
    memory = psutil.virtual_memory().total if device == "cpu" else LARGEST_GPU
    needed = 2 * cached * settings.batch_size * settings.max_new_tokens
    if needed > memory:
        raise RecipeError(
            f"{key}.batch_size",
            f"{settings.batch_size:,} texts of {settings.max_new_tokens:,} tokens cache {needed / 2**30:.1f} GiB, "
            f"there are {memory / 2**30:.1f}; lower it",
        )
