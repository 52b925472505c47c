"""The end of a stage: every step is trained, none past the last, and what comes out is finite."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from transmla.errors import RecipeError
from transmla.process.machine_faults import is_memory
from transmla.process.siblings import watch_others
from transmla.process.stopping import ask, request
from transmla.process.watch import end_after_step, training
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


class _StopBetweenSteps(TrainerCallback):
    """Saves a checkpoint and ends training at the end of a step in which a signal came, after the same in all
    processes. Within a step random numbers are drawn already, and what goes on from there would have others."""

    def __init__(self, trainer: Trainer) -> None:
        args = trainer.args
        self.requests = SharedRequests(args.device) if args.world_size > 1 else None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        number = request().number if self.requests is None else self.requests.share(request().number)
        if number:
            ask(number)
            request().saving = True
            control.should_save = control.should_training_stop = True

    def agreed(self) -> int:
        """The number of the signal by which all processes end after the last step; 0: they go on."""
        number = request().number
        if self.requests is not None and (number := self.requests.agree(number)):
            ask(number)
        return number


class SharedRequests:
    """The highest signal number that any process was sent, the same in all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: tuple[Tensor, torch.cuda.Event] | None = None

    def _highest(self, number: int) -> Tensor:
        found = torch.full((1,), number, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return found

    def agree(self, number: int) -> int:
        """Called by all processes, which wait for one another; number: this one's, 0 for none."""
        return int(self._highest(number))

    def share(self, number: int) -> int:
        """Called by all processes after every step. Nothing waits for a GPU: there the answer is that of the step
        before, whose work is done by then."""
        if self.device.type != "cuda":
            return self.agree(number)
        copied, event = torch.empty(1, dtype=torch.int32, pin_memory=True), torch.cuda.Event()
        copied.copy_(self._highest(number), non_blocking=True)
        event.record()
        before, self.before = self.before, (copied, event)
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])


def train_to_the_end(trainer: Trainer, checkpoint: Path | None, key: str) -> None:
    """Train until the last step, from a checkpoint where there is one.

    A checkpoint of the last step is loaded and no more: transformers would train one step past it. A signal ends the
    process at the end of the step that it falls into, with a checkpoint.

    Args:
        key: of the stage in the recipe, for errors.

    Raises:
        RecipeError: training was stopped before its end, its loss is not finite, or memory does not suffice.
    """
    steps = trainer.args.max_steps
    if checkpoint is not None and step_of(checkpoint) >= steps:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    else:
        trainer.add_callback(_FiniteLoss(key))
        trainer.add_callback(stop := _StopBetweenSteps(trainer))
        with training():
            _train(trainer, checkpoint, key)
            if stop.agreed():  # all are here: the first has written the checkpoint
                watch_others([])  # they end as soon as they can
                trainer.accelerator.wait_for_everyone()
                end_after_step(f" after step {trainer.state.global_step} of {steps} of {key}")
    if trainer.state.global_step != steps:
        raise RecipeError(
            key,
            f"training was stopped at step {trainer.state.global_step} of {steps}; the same command goes on",
        )


def _train(trainer: Trainer, checkpoint: Path | None, key: str) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception as error:
        if not is_memory(error):
            raise
        why = " ".join(str(error).split())[:300] or "the process could not get any more"
        raise RecipeError(
            f"{key}.trainer.per_device_train_batch_size",
            f"out of memory after step {trainer.state.global_step}: {why}; lower it or max_length, or set "
            "gradient_checkpointing; where another program took the memory, the same command goes on",
        ) from error
    finally:
        load_whole()


def require_finite(student: nn.Module, key: str) -> None:
    """Refuse a trained student with weights that are not finite.

    Raises:
        RecipeError: names the first of them.
    """
    for name, value in student.named_parameters():
        if not value.isfinite().all():
            raise RecipeError(key, f"{name} is not finite after the last step; {REMEDY}")
