"""Architecture facts that a recipe states: known to the architecture's configuration, and of a size that can be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

import transmla.families  # noqa: F401  # registers the configurations that transformers does not have
from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import other_teacher
from transmla.recipe.trainer_keys import suggest

LAYERS = 10_000
LARGEST = 2**31  # any other number

# In a config.json besides what the classes name: older names, and notes.
ALSO = {"model_type", "rope_theta", "rope_scaling", "torch_dtype", "transformers_version", "auto_map", "_name_or_path"}
ALSO |= {"num_nextn_predict_layers"}  # MiMo's, whose class is Qwen2's


def check_facts_of_recipe(recipe: Recipe) -> None:
    """Check `model.config`, and that of every teacher of its own.

    Raises:
        RecipeError: a fact that the architecture does not have, or a number that no model has.
    """
    for key, source in _sources(recipe):
        if source.config is not None:
            _check(source.config, f"{key}.config")


def _sources(recipe: Recipe) -> Iterator[tuple[str, ModelSource]]:
    yield "model", recipe.model
    for index, stage in enumerate(recipe.recover):
        teacher = other_teacher(stage)
        if teacher is not None:
            yield f"recover.{index}.teacher", teacher


def _check(facts: dict[str, Any], key: str) -> None:
    name = facts.get("model_type")
    if name is None:
        raise RecipeError(f"{key}.model_type", "it is missing; name the architecture, as llama")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        known = suggest(str(name), CONFIG_MAPPING)
        raise RecipeError(f"{key}.model_type", f"transformers knows no architecture {name!r}{known}; correct it")
    kind = CONFIG_MAPPING[name]
    known_facts = _facts_of(kind)
    for fact, value in facts.items():
        if fact not in known_facts and not fact.startswith("_"):
            raise RecipeError(
                f"{key}.{fact}", f"{kind.__name__} has no such fact{suggest(fact, known_facts)}; correct it"
            )
        largest = LAYERS if fact == "num_hidden_layers" else LARGEST
        if isinstance(value, int) and value > largest:
            raise RecipeError(f"{key}.{fact}", f"{value} is more than any model has; use at most {largest:,}")


def _facts_of(kind: type[PretrainedConfig]) -> set[str]:
    """What a configuration class takes, by all the names that it knows for them."""
    found = set(ALSO)
    for base in kind.__mro__:
        if issubclass(base, PretrainedConfig):
            found |= set(inspect.signature(base).parameters) | set(inspect.get_annotations(base))
    return found | set(kind.attribute_map)
