"""The end of a stage: every step is trained, none past the last, and what comes out is finite."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from transmla.errors import RecipeError
from transmla.recipe.launch_file import load_whole
from transmla.recover.checkpoints import step_of

REMEDY = "lower trainer.learning_rate or trainer.max_grad_norm"


class _FiniteLoss(TrainerCallback):
    """Stops a training whose loss became infinite or no number, when it is logged."""

    def __init__(self, key: str) -> None:
        self.key = key

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise RecipeError(self.key, f"the loss is {loss} at step {state.global_step}; {REMEDY}")


def _stop_between_steps(trainer: Trainer) -> None:
    """Let `enable_jit_checkpoint` save at the end of a step alone: within one, random numbers are drawn already, and
    what goes on from there would have others. At an epoch's end the step's own checkpoint may be there already."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, JITCheckpointCallback):
            for event in ("on_step_begin", "on_pre_optimizer_step", "on_epoch_end"):
                setattr(callback, event, lambda *arguments, **keywords: None)


def train_to_the_end(trainer: Trainer, checkpoint: Path | None, key: str) -> None:
    """Train until the last step, from a checkpoint where there is one.

    A checkpoint of the last step is loaded and no more: transformers would train one step past it.

    Args:
        key: of the stage in the recipe, for errors.

    Raises:
        RecipeError: training was stopped before its end, as by a signal, or its loss is not finite.
    """
    steps = trainer.args.max_steps
    if checkpoint is not None and step_of(checkpoint) >= steps:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    else:
        trainer.add_callback(_FiniteLoss(key))
        _stop_between_steps(trainer)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            load_whole()
    if trainer.state.global_step != steps:
        raise RecipeError(
            key,
            f"training was stopped at step {trainer.state.global_step} of {steps}; the same command goes on",
        )


def require_finite(student: nn.Module, key: str) -> None:
    """Refuse a trained student with weights that are not finite.

    Raises:
        RecipeError: names the first of them.
    """
    for name, value in student.named_parameters():
        if not value.isfinite().all():
            raise RecipeError(key, f"{name} is not finite after the last step; {REMEDY}")
