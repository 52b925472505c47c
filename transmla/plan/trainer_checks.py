"""trl's configuration of every stage, built before any weight is loaded: what it refuses, no stage can use."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl import DistillationConfig, SFTConfig

from transmla.errors import RecipeError
from transmla.files import temporary_folder
from transmla.plan.trainer_parts import make_parts
from transmla.recipe.stages import AnyStage, OnPolicy
from transmla.recover.on_policy import on_policy_config
from transmla.recover.stage import trainer_config

BUDGET = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps")  # the number of steps needs them


def check_trainers(stages: Sequence[AnyStage], device: str, dtype: torch.dtype, processes: int) -> None:
    """Build every stage's configuration, optimizer, schedule, loader and reports.

    Raises:
        RecipeError: the first key of a `trainer` section with which that fails.
    """
    for index, stage in enumerate(stages):
        reason = _refusal(stage, device, dtype, processes)
        if reason is not None:
            key = _culprit(stage, device, dtype, processes)
            raise RecipeError(f"recover.{index}.trainer{key}", f"trl cannot use it: {reason}; correct or remove it")


def _refusal(stage: AnyStage, device: str, dtype: torch.dtype, processes: int) -> str | None:
    """Why a stage's trainer cannot be made, in one line; None: it can."""
    # Without the device, which would open the processes' group with other timeouts than a run's own.
    where: dict[str, Any] = {"_setup_devices": torch.device(device), "_n_gpu": int(device == "cuda")}
    settings: dict[str, Any] = {"seed": 0, "device": device, "dtype": dtype, "processes": processes}
    # It would set the number format of the whole process (plan/stage_checks.py looks at it).
    stage = stage.model_copy(update={"trainer": {key: value for key, value in stage.trainer.items() if key != "tf32"}})
    with _leaving_no_trace(), temporary_folder() as folder:
        try:
            if isinstance(stage, OnPolicy):
                kind = type("_Plan", (DistillationConfig,), where)
                make_parts(on_policy_config(stage, folder, kind=kind, **settings))
            else:
                make_parts(trainer_config(stage, folder, kind=type("_Plan", (SFTConfig,), where), **settings))
        except Exception as error:  # of any kind: from trl, transformers, an optimizer's or a report's own package
            return " ".join(str(error).split())[:300] or type(error).__name__
    return None


def _culprit(stage: AnyStage, device: str, dtype: torch.dtype, processes: int) -> str:
    """The key with which a trainer cannot be made, after a dot: one that fails alone, else one without which all goes
    well; nothing where there is none."""

    def works(trainer: dict[str, Any]) -> bool:
        return _refusal(stage.model_copy(update={"trainer": trainer}), device, dtype, processes) is None

    given = stage.trainer
    needed = {key: value for key, value in given.items() if key in BUDGET}
    for key, value in given.items():
        if not works(needed | {key: value}):
            return f".{key}"
    for key in given:
        if key not in BUDGET and works({other: value for other, value in given.items() if other != key}):
            return f".{key}"
    return ""


@contextmanager
def _leaving_no_trace() -> Iterator[None]:
    """The environment as it was: some settings reach further than their object."""
    environment = dict(os.environ)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
