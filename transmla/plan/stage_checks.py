"""What can be refused of a recipe's recovery stages before weights load."""

from __future__ import annotations

import copy
import os
from pathlib import Path
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
from transmla.recipe.stages import AnyStage, Distill, Layerwise, OnPolicy, TrainerStage
from transmla.sources.check import check_planned
from transmla.sources.config import source_config
from transmla.sources.kinds import kind_of


def check_stages(
    recipe: Recipe, config: PretrainedConfig, device: str, dtype: torch.dtype, kinds: dict[str, str]
) -> None:
    """Check every stage's trainer, rows, teacher and tools.

    On a GPU a loss over logits is always compiled (transmla.recover.losses); so are kernels of trl's on-policy loss.

    Args:
        config: of the source. kinds: what the rows of every list that was looked at are, by its key.

    Raises:
        RecipeError: a trainer that trl cannot make; rows that do not fit the model or the loss; a compiled stage
            without a compiler; a teacher whose logits cannot be compared.
    """
    for index, stage in enumerate(recipe.recover):
        key = f"recover.{index}.trainer"
        if f"recover.{index}.data" in kinds:
            _check_rows(stage, key, kinds[f"recover.{index}.data"], config)
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


def _check_rows(stage: AnyStage, key: str, kind: str, config: PretrainedConfig) -> None:
    """Rows within the model's positions, and losses that the kind of data has."""
    trainer, positions = stage.trainer, config.max_position_embeddings
    if isinstance(stage, OnPolicy):
        return
    if stage.train == "lora" and stage.lora.r > config.hidden_size:
        raise RecipeError(
            f"{key.removesuffix('trainer')}lora.r", f"{stage.lora.r} is above the {config.hidden_size} of the model"
        )
    longest, unit = trainer.get("max_length", ROW_LENGTH), trainer.get("pad_to_multiple_of")
    if longest > positions:
        raise RecipeError(
            f"{key}.max_length", f"rows have {longest} tokens, the model {positions} positions; use at most that"
        )
    if isinstance(unit, int) and -(-longest // unit) * unit > positions:
        raise RecipeError(
            f"{key}.pad_to_multiple_of",
            f"{longest} filled up to a multiple of {unit} is above the {positions} positions",
        )
    if trainer.get("padding_free") and not trainer.get("packing", True):
        raise RecipeError(f"{key}.padding_free", "rows that are not packed may have any length; leave it out, or pack")
    if trainer.get("completion_only_loss") and kind != "completion":
        raise RecipeError(
            f"{key}.completion_only_loss", f"the data is {kind}, it has no prompt and completion; leave it out"
        )
    if trainer.get("assistant_only_loss") and kind == "text":
        raise RecipeError(f"{key}.assistant_only_loss", "the data is text, nobody speaks in it; leave it out")
    template = trainer.get("chat_template_path")
    if template is not None and not Path(template).is_file():
        raise RecipeError(f"{key}.chat_template_path", f"no such file: {template}; correct the path")


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
