"""Source architectures: one small adapter each. `family_of` finds the adapter of a configuration."""

from __future__ import annotations

from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.families.base import Family, SourceAttention
from transmla.families.llama import LLAMA
from transmla.families.qwen2 import QWEN2

__all__ = ["FAMILIES", "Family", "SourceAttention", "family_of"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN2)}


def family_of(config: PretrainedConfig) -> Family:
    """The adapter of a source configuration.

    Raises:
        RecipeError: the architecture has no adapter, or has a feature that its adapter does not carry over.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise RecipeError("model.source", f"no adapter for model type {config.model_type!r}; there are: {known}")
    family.check(config)
    return family
