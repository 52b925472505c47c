"""What can be refused of a recipe's recovery stages before weights load."""

from __future__ import annotations

import os
import shutil

from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.modeling.window import final_softcap
from transmla.recipe import Distill, ModelSource, Recipe, TrainerStage
from transmla.sources import kind_of, source_config

COMPILERS = ("cc", "gcc", "clang", "g++", "clang++")


def check_stages(recipe: Recipe, config: PretrainedConfig) -> None:
    """Check every stage's teacher and tools. config: of the source.

    Raises:
        RecipeError: a compiled stage without a compiler; a teacher whose logits cannot be compared.
    """
    for index, stage in enumerate(recipe.recover):
        if isinstance(stage, TrainerStage) and stage.compile and not _has_compiler():
            raise RecipeError(f"recover.{index}.compile", "there is no C compiler on the PATH; install one, or use false")
        if isinstance(stage, Distill) and isinstance(stage.teacher, ModelSource):
            _check_teacher(stage.teacher, f"recover.{index}.teacher", config, online=not recipe.dry_run)


def _has_compiler() -> bool:
    return "CXX" in os.environ or any(map(shutil.which, COMPILERS))


def _check_teacher(teacher: ModelSource, key: str, config: PretrainedConfig, *, online: bool) -> None:
    if teacher.config is None and kind_of(teacher.source) == "hub" and not online:
        return  # a plan asks no hub
    try:
        facts = source_config(teacher)
    except RecipeError as error:
        raise RecipeError(key, str(error)) from None
    if final_softcap(facts) != final_softcap(config):
        raise RecipeError(key, "its final logits are capped otherwise than the source's; name another")
