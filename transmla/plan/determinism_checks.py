"""`deterministic: true`: what cannot be reproducible on a GPU is refused, what another way can do is replaced."""

from __future__ import annotations

import copy

import torch
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.families import FAMILIES, default_kernel
from transmla.geometry import MLAGeometry
from transmla.modeling.determinism import WORKSPACE, WORKSPACES, workspace_conflict
from transmla.modeling.kernels.cudnn_packed import why_not_ordered
from transmla.modeling.kernels.packed import needs_mask
from transmla.recipe.budget import ROW_LENGTH
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import AnyStage, Layerwise, OnPolicy, TrainerStage, other_teacher


def check_determinism(
    recipe: Recipe, config: PretrainedConfig, geometry: MLAGeometry, device: str, dtype: torch.dtype
) -> list[str]:
    """Check a recipe that asks for reproducible arithmetic.

    Returns:
        what is done otherwise than the recipe or its defaults say, one line for each key.

    Raises:
        RecipeError: a key whose way has no fixed order, with one that has.
    """
    if not recipe.deterministic:
        return []
    replaced: list[str] = []
    for index, stage in enumerate(recipe.recover):
        key = f"recover.{index}"
        if stage.trainer.get("dataloader_in_order") is False:
            raise RecipeError(
                f"{key}.trainer.dataloader_in_order",
                "batches would come in the order in which workers finish; leave it out, or use deterministic=false",
            )
        if stage.kind == "distill" and stage.keep_teacher:
            replaced.append(
                f"{key}.keep_teacher: the teacher reads every batch; states kept of other batches would differ after "
                "a resume"
            )
    if device != "cuda":
        return replaced
    if (found := workspace_conflict()) is not None:
        raise RecipeError(
            "deterministic", f"{WORKSPACE} is {found!r} in the environment; unset it, or set it to {WORKSPACES[0]}"
        )
    for index, entry in enumerate(recipe.write):
        if entry.engine == "vllm":
            raise RecipeError(
                f"write.{index}.engine",
                "what vLLM draws depends on which texts it happens to batch; use transformers, or deterministic=false",
            )
    if any(entry.engine == "auto" for entry in recipe.write):
        replaced.append("write: text is drawn by transformers, never by vLLM")
    for index, stage in enumerate(recipe.recover):
        _check_stage(stage, f"recover.{index}", config, geometry, dtype)
    return replaced


def _check_stage(
    stage: AnyStage, key: str, config: PretrainedConfig, geometry: MLAGeometry, dtype: torch.dtype
) -> None:
    if isinstance(stage, OnPolicy):
        if stage.trainer.get("top_p", 1.0) < 1.0:
            raise RecipeError(
                f"{key}.trainer.top_p",
                "transformers sums probabilities in any order for it; leave it out, or use top_k or min_p",
            )
        return
    device = torch.device("cuda")
    if stage.attention == "cudnn":
        widths = geometry.qk_nope_head_dim + geometry.qk_rope_head_dim, geometry.v_head_dim
        if (reason := why_not_ordered(device, dtype, *widths)) is not None:
            raise RecipeError(f"{key}.attention", f"cuDNN's kernel: {reason}; use flash")
    if stage.compile is True and not _one_graph(stage, config, device, dtype):
        raise RecipeError(
            f"{key}.compile",
            "rows differ in length, and which lengths are compiled would depend on where a run resumes; use "
            "compile: false, or trainer.packing",
        )


def _one_graph(stage: TrainerStage, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all batches of a compiled stage have one graph: rows of one length, or packed ones without a mask."""
    trainer = stage.trainer
    if not trainer.get("packing", True):
        return False
    if trainer.get("packing_strategy") == "wrapped":
        return True
    facts, other = copy.deepcopy(config), other_teacher(stage)  # type: ignore[arg-type]  # OnPolicy is none
    facts._attn_implementation = default_kernel(config.model_type)
    looked_into = isinstance(stage, Layerwise) and bool(stage.logits)
    foreign = other is not None and other.config is not None and other.config.get("model_type") not in FAMILIES
    length = int(trainer.get("max_length", ROW_LENGTH))
    masked = stage.attention == "mask" or looked_into or foreign
    return not masked and needs_mask(facts, length, dtype, device) is None
