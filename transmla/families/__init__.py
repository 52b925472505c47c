"""Source architectures: one small adapter each. `family_of` finds the adapter of a configuration.

Importing this package registers the configurations with AutoConfig, importing `transmla.families.students` the models.
"""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

from transmla.errors import RecipeError
from transmla.families.family import Family, HeadNorm, SourceAttention
from transmla.families.gemma2 import GEMMA2
from transmla.families.gemma3 import GEMMA3
from transmla.families.llama import LLAMA
from transmla.families.mimo import MIMO
from transmla.families.mistral import MISTRAL
from transmla.families.mixtral import MIXTRAL
from transmla.families.qwen2 import QWEN2
from transmla.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "HeadNorm", "SourceAttention", "default_kernel", "family_of", "family_of_student"]

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, MIXTRAL, GEMMA2, GEMMA3, MIMO)
}
_BY_STUDENT = {family.student_config.model_type: family for family in FAMILIES.values()}

for _family in FAMILIES.values():
    for _config in (_family.student_config, _family.source_config):
        if _config is not None:
            AutoConfig.register(_config.model_type, _config, exist_ok=True)


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


def family_of_student(config: PretrainedConfig) -> Family:
    """The adapter whose student has this configuration."""
    return _BY_STUDENT[config.model_type]


def default_kernel(model_type: str) -> str:
    """transformers' `attn_implementation` for a source, a student or an exported model."""
    family = FAMILIES.get(model_type) or _BY_STUDENT.get(model_type)
    return "sdpa" if family is None else family.kernel
