"""What can be refused of a recipe's recovery stages before weights load."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.utils import is_torch_tf32_available

from transmla.errors import RecipeError
from transmla.families import default_kernel
from transmla.hardware import has_compiler
from transmla.modeling.config_facts import final_softcap
from transmla.modeling.kernels.cudnn_packed import why_no_cudnn
from transmla.modeling.kernels.packed import needs_mask
from transmla.plan.trainer_checks import check_trainers
from transmla.recipe.budget import ROW_LENGTH
from transmla.recipe.model_source import ModelSource
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import AnyStage, Distill, Layerwise, TrainerStage
from transmla.sources.check import check_planned
from transmla.sources.config import source_config
from transmla.sources.kinds import kind_of


def check_stages(recipe: Recipe, config: PretrainedConfig, device: str, dtype: torch.dtype) -> None:
    """Check every stage's trainer, teacher and tools.

    On a GPU a loss over logits is always compiled (transmla.recover.losses); so are kernels of trl's on-policy loss.

    Args:
        config: of the source.

    Raises:
        RecipeError: a trainer that trl cannot make; a compiled stage without a compiler; a teacher whose logits cannot
            be compared.
    """
    for index, stage in enumerate(recipe.recover):
        key = f"recover.{index}.trainer"
        _check_device(stage, key, device)
        if isinstance(stage, TrainerStage):
            _check_attention(stage, f"recover.{index}", config, torch.device(device), dtype)
    check_trainers(recipe.recover, device, dtype, int(os.environ.get("WORLD_SIZE", "1")))
    for index, stage in enumerate(recipe.recover):
        if device == "cuda" and stage.kind != "layerwise" and not has_compiler():
            raise RecipeError(
                f"recover.{index}", "its loss is compiled on a GPU, and there is no C compiler on the PATH; install one"
            )
        if isinstance(stage, TrainerStage) and stage.compile is True and not has_compiler():
            raise RecipeError(
                f"recover.{index}.compile", "there is no C compiler on the PATH; install one, or use false"
            )
        if isinstance(stage, Distill) and isinstance(stage.teacher, ModelSource):
            _check_teacher(stage, stage.teacher, f"recover.{index}.teacher", config, online=not recipe.dry_run)


def _check_device(stage: AnyStage, key: str, device: str) -> None:
    """Keys that a GPU alone can honour."""
    if stage.trainer.get("tf32") and not (device == "cuda" and is_torch_tf32_available()):
        raise RecipeError(f"{key}.tf32", "this device has no such number format (Ampere and newer have); leave it out")
    if stage.trainer.get("activation_offloading") and device != "cuda":
        raise RecipeError(f"{key}.activation_offloading", "activations are in the CPU's memory already; leave it out")


def _check_attention(
    stage: TrainerStage, key: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """A kernel that was asked for by name and cannot run."""
    if stage.attention in ("auto", "mask"):
        return
    key, instead = f"{key}.attention", "auto would use"
    trainer = stage.trainer
    if not trainer.get("packing", True) or trainer.get("packing_strategy") == "wrapped":
        raise RecipeError(
            key,
            f"{stage.attention} is for packed documents, and rows of this stage are not packed; leave it out",
        )
    length = int(trainer.get("max_length", ROW_LENGTH))
    facts = copy.deepcopy(config)
    facts._attn_implementation = default_kernel(config.model_type)
    if (reason := needs_mask(facts, length, dtype, device)) is not None:
        raise RecipeError(key, f"{stage.attention} cannot compute this: {reason}; {instead} a mask")
    if isinstance(stage, Layerwise) and stage.logits:
        raise RecipeError(key, f"{stage.attention} does not show the logits that the loss compares; {instead} a mask")
    if device.type != "cuda":
        raise RecipeError(key, f"{stage.attention} needs a GPU; {instead} every document by itself")
    if stage.attention == "cudnn" and (reason := why_no_cudnn(device)) is not None:
        raise RecipeError(key, f"cuDNN's kernel cannot run: {reason}; {instead} FlashAttention's")


def _check_teacher(stage: Distill, teacher: ModelSource, key: str, config: PretrainedConfig, *, online: bool) -> None:
    if teacher.config is None and kind_of(teacher.source) == "hub" and not online:
        return  # a plan asks no hub
    facts = source_config(teacher, key)
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(facts), None)
    if architecture is None or architecture.base_model_prefix != "model":
        raise RecipeError(
            key, f"{facts.model_type} has no trunk of the form that is asked here; name a model of the source's family"
        )
    if facts.max_position_embeddings < int(stage.trainer.get("max_length", ROW_LENGTH)):
        raise RecipeError(
            key, f"it has {facts.max_position_embeddings} positions, rows are longer; lower trainer.max_length"
        )
    if final_softcap(facts) != final_softcap(config):
        raise RecipeError(key, "its final logits are capped otherwise than the source's; name another")
    check_planned(teacher, facts, key)
