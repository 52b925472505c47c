"""What a launch file cannot be used for, before weights load."""

from __future__ import annotations

import os
from importlib.util import find_spec

from transmla.errors import RecipeError
from transmla.recipe.launch_file import IN_PARTS, asks, layout
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import Distill, TrainerStage

# Optimizers that look at every weight for itself: of a matrix in shards no process has rows or columns whole, and
# 8-bit moments are scaled by blocks of their own.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")

# What a launch file may ask for that no stage of this project runs in, by the variable that accelerate sets for it.
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not used; start with a file of accelerate_configs",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config is not used; start with a file of accelerate_configs",
}


def check_launch_file() -> None:
    """Refuse what a launch file asks for and no stage runs in.

    Raises:
        RecipeError: names the launch file's entry.
    """
    for name, reason in REFUSED.items():
        if asks(name):
            raise RecipeError("launch", reason)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", ""):
        raise RecipeError(
            "launch",
            f"dynamo_config: the launch file compiles the whole model ({backend}); leave it out, and use "
            "recover.N.compile",
        )
    layout()


def check_launch(recipe: Recipe, device: str, dtype_name: str) -> None:
    """Check the launch file in use against the recipe's stages.

    Raises:
        RecipeError: DeepSpeed is missing, or a stage asks for what shards do not have.
    """
    way = layout()
    if way == "whole":
        return
    if way.startswith("zero") and find_spec("deepspeed") is None:
        raise RecipeError("launch", 'DeepSpeed is not installed; pip install "transmla[deepspeed]"')
    if way.startswith("zero") and device == "cpu" and dtype_name != "float32":
        raise RecipeError("dtype", f"DeepSpeed on a CPU computes in float32, not {dtype_name}; use float32")
    for index, stage in enumerate(recipe.recover):
        key = f"recover.{index}"
        optimizer = str(stage.trainer.get("optim", ELEMENTWISE[0]))
        if optimizer not in ELEMENTWISE:
            raise RecipeError(
                f"{key}.trainer.optim",
                f"{optimizer} reads whole matrices, and {way} has them in pieces; use one of {', '.join(ELEMENTWISE)}",
            )
        if isinstance(stage, TrainerStage) and stage.muon_learning_rate is not None:
            raise RecipeError(
                f"{key}.muon_learning_rate",
                f"Muon reads whole matrices, and {way} has them in pieces; leave it out, or start with ddp.yaml",
            )
        if isinstance(stage, Distill) and stage.keep_teacher:
            raise RecipeError(f"{key}.keep_teacher", f"it is for one process with whole models, not {way}; use false")
        if isinstance(stage, TrainerStage) and stage.compile is True and way == "zero3":
            raise RecipeError(
                f"{key}.compile", "ZeRO-3 gathers weights inside the layers, where nothing can be compiled; use auto"
            )
        if stage.trainer.get("activation_offloading") and way in IN_PARTS:
            raise RecipeError(
                f"{key}.trainer.activation_offloading", f"not with {way}; use trainer.gradient_checkpointing"
            )
