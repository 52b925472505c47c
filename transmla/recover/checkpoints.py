"""Checkpoints that are there whole or not at all, for any transformers trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from transmla.files import PARTIAL, damage, fsync, fsync_tree, listed_files, remove, save_manifest

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin, which has no trainer of its own

# What a stage goes on from, by the beginnings of file names: transformers would begin anew with any of the rest.
PARTS = {
    "the weights": ("model", "adapter_model", "pytorch_model"),
    "the optimizer": ("optimizer", "global_step"),
    "the scheduler": ("scheduler", "global_step"),
    "the random numbers": ("rng_state",),
    "the trainer's state": ("trainer_state.json",),
}


class AtomicCheckpoints(Trainer):
    """Mixin before a `transformers.Trainer`.

    transformers writes `checkpoint-N` file by file, and a run that was killed meanwhile resumes from the torso. Here
    all of it is written below `.partial` with a manifest, synced, and renamed once every process is done; old
    checkpoints go last.
    """

    _saving = False

    def _get_output_dir(self, trial: object) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        final = Path(super()._get_output_dir(trial))
        partial = final / PARTIAL
        if self.is_world_process_zero():
            remove(partial)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_manifest(partial / name)
            fsync_tree(partial / name)
            remove(final / name)
            os.replace(partial / name, final / name)
            remove(partial)
            fsync(final)  # the rename itself
            if self.args.save_total_limit:
                rotate_checkpoints(output_dir=str(final), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


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
