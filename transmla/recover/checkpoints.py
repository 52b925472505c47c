"""Checkpoints that are there whole or not at all, for any transformers trainer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from transmla.files import PARTIAL, fsync, fsync_tree

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin, which has no trainer of its own


class AtomicCheckpoints(Trainer):
    """Mixin before a `transformers.Trainer`.

    transformers writes `checkpoint-N` file by file, and a run that was killed meanwhile resumes from the torso. Here
    all of it is written below `.partial`, synced, and renamed once every process is done; old checkpoints go last.
    """

    _saving = False

    def _get_output_dir(self, trial: object) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        final = Path(super()._get_output_dir(trial))
        partial = final / PARTIAL
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            fsync_tree(partial / name)
            shutil.rmtree(final / name, ignore_errors=True)
            os.replace(partial / name, final / name)
            shutil.rmtree(partial)
            fsync(final)  # the rename itself
            if self.args.save_total_limit:
                rotate_checkpoints(output_dir=str(final), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a stage, or None."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
