"""Facts of an architecture that a recipe states: known ones, and no number that would have a plan build without end."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from transmla.errors import RecipeError
from transmla.families import FAMILIES
from transmla.recipe.model_source import ModelSource
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import other_teacher
from transmla.recipe.trainer_keys import suggest

# In a config.json besides what the classes name: older names, notes, and MiMo's, whose class is Qwen2's.
ALSO = {"rope_theta", "rope_scaling", "torch_dtype", "auto_map", "_name_or_path", "num_nextn_predict_layers"}

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


def check_facts_of_recipe(recipe: Recipe) -> None:
    """Check `model.config`, and that of every teacher of its own.

    Raises:
        RecipeError: a fact that no architecture has, which transformers would take without a word; a number that no
            model has.
    """
    for key, facts in _facts(recipe):
        known = _known_facts() if facts.get("model_type") in FAMILIES else None
        for fact, value in facts.items():
            if known is not None and fact not in known:
                raise RecipeError(f"{key}.{fact}", f"no such fact{suggest(fact, known)}; correct it, or leave it out")
            largest = LIMITS.get(fact, LARGEST)
            if isinstance(value, int | float) and not value <= largest:
                raise RecipeError(f"{key}.{fact}", f"{value} is more than any model has; use at most {largest:,}")


def _facts(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    sources: dict[str, ModelSource | None] = {"model": recipe.model}
    sources |= {f"recover.{index}.teacher": other_teacher(stage) for index, stage in enumerate(recipe.recover)}
    for key, source in sources.items():
        if source is not None and source.config is not None:
            yield f"{key}.config", source.config


@cache
def _known_facts() -> set[str]:
    """What the configurations of all families take: some architectures read a fact that their own class does not
    declare (Qwen2 a head_dim)."""
    found = set(ALSO)
    for name in FAMILIES:
        kind = CONFIG_MAPPING[name]
        for base in kind.__mro__:
            if issubclass(base, PretrainedConfig):
                found |= set(inspect.signature(base).parameters) | set(inspect.get_annotations(base))
        found |= set(kind.attribute_map)
    return found
