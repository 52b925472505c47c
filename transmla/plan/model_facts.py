"""Numbers of an architecture that a recipe states: none that would have a plan build a model without end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import other_teacher

LAYERS = 512
HEADS = 2**16
DIMENSION = 2**22
LARGEST = 2**31  # any other number

LIMITS = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_local_experts": HEADS,
    "hidden_size": DIMENSION,
    "intermediate_size": DIMENSION,
    "head_dim": DIMENSION,
    "vocab_size": 2**26,
}


def check_sizes_of_facts(recipe: Recipe) -> None:
    """Check `model.config`, and that of every teacher of its own.

    Raises:
        RecipeError: a number that no model has.
    """
    for key, facts in _facts(recipe):
        for fact, value in facts.items():
            largest = LIMITS.get(fact, LARGEST)
            if isinstance(value, int | float) and not value <= largest:
                raise RecipeError(f"{key}.{fact}", f"{value} is more than any model has; use at most {largest:,}")


def _facts(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    sources: dict[str, ModelSource | None] = {"model": recipe.model}
    sources |= {f"recover.{index}.teacher": other_teacher(stage) for index, stage in enumerate(recipe.recover)}
    for key, source in sources.items():
        if source is not None and source.config is not None:
            yield f"{key}.config", source.config
