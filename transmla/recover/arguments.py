"""What every stage tells its trainer, whichever of trl's configuration classes that takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from transmla.modeling.determinism import is_deterministic
from transmla.recipe.budget import steps_of
from transmla.recipe.launch_file import layout
from transmla.recipe.stages import AnyStage

# What a recipe need not say.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "logging_nan_inf_filter": False,  # it waits for the device in every step, and hides what should be seen
}
# What a recipe may say without effect: every stage saves when a signal comes.
OWN: dict[str, Any] = {"enable_jit_checkpoint": False}


def common_arguments(
    stage: AnyStage, folder: Path, *, seed: int, device: str, dtype: torch.dtype, processes: int
) -> dict[str, Any]:
    """What follows from the run, and is no key of a recipe (but for copies, which one may set otherwise)."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # a launcher's setting would override the recipe's dtype
    gpu = device != "cpu"  # a copy from memory that is not pinned waits for the device
    by_zero = layout().startswith("zero")  # DeepSpeed finds its device itself, which accelerate calls no CPU
    settings: dict[str, Any] = {"dataloader_pin_memory": gpu, "accelerator_config": {"non_blocking": gpu}}
    if is_deterministic():
        # Else DDP groups the gradients anew after its first step, and a resumed run adds those of that step otherwise.
        settings["ddp_find_unused_parameters"] = True
    return {key: value for key, value in settings.items() if key not in stage.trainer} | {
        "output_dir": str(folder),
        "max_steps": steps_of(stage, processes),
        "seed": seed,
        "data_seed": seed,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": not gpu and not by_zero,
        "ddp_backend": "gloo" if by_zero and not gpu else None,
    }
