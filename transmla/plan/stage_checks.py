"""What can be refused of a recipe's recovery stages before weights load."""

from __future__ import annotations

import os
import shutil
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from transmla.errors import RecipeError
from transmla.modeling.config_facts import final_softcap
from transmla.recipe.model_source import ModelSource
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import Distill, TrainerStage
from transmla.sources.config import source_config
from transmla.sources.kinds import kind_of

COMPILERS = ("cc", "gcc", "clang", "g++", "clang++")


def check_stages(recipe: Recipe, config: PretrainedConfig, device: str) -> None:
    """Check every stage's teacher and tools. config: of the source.

    On a GPU a loss over logits is always compiled (transmla.recover.losses); so are kernels of trl's on-policy loss.

    Raises:
        RecipeError: a compiled stage without a compiler; a teacher whose logits cannot be compared.
    """
    for index, stage in enumerate(recipe.recover):
        if device == "cuda" and stage.kind != "layerwise" and not _has_compiler():
            raise RecipeError(
                f"recover.{index}", "its loss is compiled on a GPU, and there is no C compiler on the PATH; install one"
            )
        if isinstance(stage, TrainerStage) and stage.compile and not _has_compiler():
            raise RecipeError(
                f"recover.{index}.compile", "there is no C compiler on the PATH; install one, or use false"
            )
        if isinstance(stage, Distill) and isinstance(stage.teacher, ModelSource):
            _check_teacher(stage, stage.teacher, f"recover.{index}.teacher", config, online=not recipe.dry_run)


def _has_compiler() -> bool:
    return "CC" in os.environ or "CXX" in os.environ or any(map(shutil.which, COMPILERS))


def _check_teacher(stage: Distill, teacher: ModelSource, key: str, config: PretrainedConfig, *, online: bool) -> None:
    if teacher.config is None and kind_of(teacher.source) == "hub" and not online:
        return  # a plan asks no hub
    try:
        facts = source_config(teacher)
    except RecipeError as error:
        raise RecipeError(key, str(error)) from None
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(facts), None)
    if architecture is None or architecture.base_model_prefix != "model":
        raise RecipeError(
            key, f"{facts.model_type} has no trunk of the form that is asked here; name a model of the source's family"
        )
    if facts.max_position_embeddings < int(stage.trainer.get("max_length", 1024)):
        raise RecipeError(
            key, f"it has {facts.max_position_embeddings} positions, rows are longer; lower trainer.max_length"
        )
    if final_softcap(facts) != final_softcap(config):
        raise RecipeError(key, "its final logits are capped otherwise than the source's; name another")
