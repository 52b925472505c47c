"""Checkpoints that are there whole or not at all, written beside the training loop, for any transformers trainer."""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from transmla.errors import RecipeError
from transmla.files import PARTIAL, damage, fsync, fsync_tree, listed_files, remove, save_manifest
from transmla.recover.background import Background
from transmla.recover.shard_files import FOLDER, load_optimizer, load_weights, save_shards
from transmla.recover.sharded_trainer import ShardedTraining
from transmla.recover.snapshot import (
    HostMemory,
    join_optimizer,
    read_optimizer,
    read_weights,
    split_optimizer,
    trained_weights,
)

WEIGHTS = "trained.safetensors"
MOMENTS = "optimizer.safetensors"
GROUPS = "optimizer_groups.pt"  # of the optimizer, what is no tensor

# What a stage goes on from, by the beginnings of file names. `global_step` is DeepSpeed's; checkpoints of
# earlier versions had `model.safetensors` and `optimizer.pt`.
PARTS = {
    "the trained weights": (WEIGHTS, FOLDER, "global_step"),
    "the optimizer": (MOMENTS, FOLDER, "global_step"),
    "the scheduler": ("scheduler", "global_step"),
    "the random numbers": ("rng_state",),
    "the trainer's state": ("trainer_state.json",),
}


class AtomicCheckpoints(ShardedTraining):
    """Mixin before a `transformers.Trainer`: checkpoints of what is trained, which hardly stop the training.

    transformers writes `checkpoint-N` file by file, frozen weights too, and a run that was killed meanwhile resumes
    from the torso. Here

        the loop    copies trained weights and optimizer into host memory; small files go below `.partial` at once
        a thread    writes the copies beside them, a manifest, syncs, renames to `checkpoint-N`, removes old checkpoints

    The thread is waited for before the next snapshot and when training ends, in whichever way; its error ends
    training. On several processes the first copies and writes, and every one adds its random numbers before that.
    Of a sharded model every process writes what it keeps, and training waits (transmla.recover.shard_files; DeepSpeed
    writes its own).
    """

    _saving = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writer = Background()
        self._memory = HostMemory()
        self._pending: dict[str, dict[str, Tensor]] = {}  # by file, what is to be copied
        self.stalls = {"count": 0, "stalled_seconds": 0.0}  # of checkpoints, and how long training stood still for them
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which also ends with the last checkpoint on disk.

        Raises:
            RecipeError: a checkpoint could not be written.
        """
        try:
            output = super().train(*args, **kwargs)
            with self._stalled():
                self._wait()
        finally:
            self._writer.join()  # on an error too: what is being written will be whole
            self._memory.release()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' own; ends training where a checkpoint could not be written."""
        with writing(self.args.output_dir):
            self._writer.check()
        return super().training_step(*args, **kwargs)

    @property
    def _in_pieces(self) -> bool:
        """Whether no process has all weights and moments, and all of them write."""
        return self.sharded or self.is_deepspeed_enabled

    @contextmanager
    def _stalled(self) -> Iterator[None]:
        """Counts the time within as lost to checkpoints; what the device has still to do before it does not count."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        begun = time.monotonic()
        yield
        self.stalls["stalled_seconds"] = round(self.stalls["stalled_seconds"] + time.monotonic() - begun, 3)

    def _wait(self) -> None:
        """Wait until the last checkpoint is there; raises what came in its way."""
        self._writer.join()
        with writing(self.args.output_dir):
            self._writer.check()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: trl writes one with every checkpoint, and nobody reads it."""

    def _get_output_dir(self, trial: object) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        if self.is_deepspeed_enabled and self.state.global_step >= self.state.max_steps:
            return  # nothing but a training that goes on reads its files
        with self._stalled():
            self._wait()
            with writing(self.args.output_dir):
                self._snapshot(model, trial)
        self.stalls["count"] += 1

    def _snapshot(self, model: nn.Module, trial: object) -> None:
        folder, step = Path(super()._get_output_dir(trial)), self.state.global_step
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        partial = folder / PARTIAL / final.name
        if self.is_world_process_zero():
            remove(partial.parent)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            remove(final)  # no whole one: training went on from the newest of these
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        files = self._memory.copies(self._pending)
        self._pending = {}
        self.accelerator.wait_for_everyone()  # every process's random numbers are there
        limit = self.args.save_total_limit
        if self.is_world_process_zero():
            if self._in_pieces:
                publish(partial, final, files, limit)
            else:
                self._writer.start(lambda: publish(partial, final, files, limit))
        if self._in_pieces:
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' own; into a checkpoint, the trained weights alone."""
        if not self._saving:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save and not self._in_pieces:
            assert self.model is not None and output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self._pending[WEIGHTS] = trained_weights(self.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.model is not None and self.optimizer is not None and self.lr_scheduler is not None
        small: dict[str, Any] = {}
        if self.sharded:
            save_shards(Path(output_dir), self.model, _unwrapped(self.optimizer))
        elif self.args.should_save:
            self._pending[MOMENTS], small[GROUPS] = split_optimizer(self.optimizer.state_dict())
        if self.args.should_save:
            with warnings.catch_warnings(action="ignore"):  # PyTorch reminds of the optimizer, which is here too
                small[SCHEDULER_NAME] = self.lr_scheduler.state_dict()
            for name, content in small.items():
                packed = io.BytesIO()  # torch.save to a file turns a full disk into an error without a reason
                torch.save(content, packed)
                (Path(output_dir) / name).write_bytes(packed.getbuffer())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        assert self.model is not None
        folder = Path(resume_from_checkpoint)
        try:
            if self.sharded:
                load_weights(folder, self.model)
            else:
                read_weights(folder / WEIGHTS, self.model)
        except (OSError, ValueError, SafetensorError) as error:
            raise RecipeError(
                "output_dir", f"{resume_from_checkpoint} is not of what this stage trains: {error}; remove it"
            ) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        folder = Path(checkpoint)
        if self.sharded:
            assert self.model is not None
            load_optimizer(folder, self.model, _unwrapped(self.optimizer))
        else:
            groups = torch.load(folder / GROUPS, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(join_optimizer(read_optimizer(folder / MOMENTS, self.args.device), groups))
        with warnings.catch_warnings(action="ignore"):
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """torch's own, from inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def writing(folder: str | None) -> Iterator[None]:
    """Turns an error of the disk, or of the memory for the copy, into one sentence.

    Raises:
        RecipeError: with the reason.
    """
    try:
        yield
    except (OSError, MemoryError, SafetensorError) as error:
        raise RecipeError(
            "output_dir",
            f"no checkpoint can be written below {folder}: {error}; make room, or mend the folder, and "
            "the same command goes on",
        ) from error


def publish(partial: Path, final: Path, files: dict[str, dict[str, Tensor]], limit: int | None) -> None:
    """Add files of tensors to a folder, make it a whole checkpoint, remove those beyond the `limit` newest."""
    for name, tensors in files.items():
        save_file(tensors, partial / name)
    save_manifest(partial)
    fsync_tree(partial)
    os.replace(partial, final)
    remove(partial.parent)
    fsync(final.parent)  # the rename itself
    if limit:
        rotate_checkpoints(output_dir=str(final.parent), save_total_limit=limit)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved; -1 of a folder with another name."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def _flaw(checkpoint: Path) -> str | None:
    """Why training cannot go on from a checkpoint; None: it can."""
    if (found := damage(checkpoint)) is not None:
        return found
    names = [Path(name).parts[0] for name in listed_files(checkpoint) or {}]
    missing = [part for part, starts in PARTS.items() if not any(name.startswith(starts) for name in names)]
    return f"it lacks {missing[0]}" if missing else None


def last_checkpoint(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of a stage that is whole, or None. A damaged one is announced and removed."""
    found = sorted((path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path) >= 0), key=step_of)
    while found:
        newest = found.pop()
        if (flaw := _flaw(newest)) is None:
            return newest
        rest = f"training goes on from {found[-1].name}" if found else "training begins anew"
        say(f"warning: {newest} is damaged: {flaw}; {rest}")
        remove(newest)
    return None
