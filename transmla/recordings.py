"""The part of a pipeline that records teachers, and checks what is recorded before it is trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.data.mixture import load_mixture
from transmla.entries import Part
from transmla.errors import RecipeError
from transmla.fingerprints import Fingerprints
from transmla.maker import Maker
from transmla.plan import rows_of_a_step, steps_of
from transmla.recipe_stages import AnyStage

if TYPE_CHECKING:
    from transmla.recover.distill import DistillTrainer


def is_recorded(stage: AnyStage) -> bool:
    """Whether a stage learns from what `transmla record` wrote."""
    return stage.kind == "distill" and stage.teacher == "recorded"


class Recordings(Maker):
    """What `transmla record` does; a pipeline sets the attributes."""

    out: Path
    digests: Fingerprints
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel

    def _names(self, data: Sequence[str | Part], key: str) -> list[str | Part]:
        """A `data` list in which what was written has its place."""
        raise NotImplementedError

    def stage_folder(self, index: int) -> Path:
        """Where the result of recovery stage `index` is."""
        raise NotImplementedError

    def recording_folder(self, index: int) -> Path:
        """Where `record` writes for recovery stage `index`, and its training reads."""
        folder = self.recipe.recover[index].record.folder
        return self.out / "recorded" / str(index) if folder is None else Path(folder)

    def record(self) -> None:
        """The teacher's top-k log-probabilities for every stage that wants them recorded."""
        from transmla.recover.record import record_teacher

        if self.state.num_processes > 1:
            raise RecipeError("record", "recording runs in one process; start it without a launcher")
        stages = [(index, stage) for index, stage in enumerate(self.recipe.recover) if is_recorded(stage)]
        if not stages:
            raise RecipeError("recover", "no stage has teacher: recorded; there is nothing to record")
        for index, stage in stages:
            self.say(f"[record {index}] ...")
            key = f"recover.{index}.data"
            started = time.monotonic()
            result = record_teacher(
                self.recording_folder(index),
                stage,
                load_mixture(self._names(stage.data, key), key, self.tokenizer, self.recipe.seed),
                self.tokenizer,
                lambda: self.teacher,
                inputs={"settings": self.digests.recording(index)},
                vocabulary=self.prepared.config.vocab_size,
                key=f"recover.{index}.record",
                seed=self.recipe.seed,
                device=self.prepared.device,
                dtype=self.prepared.dtype,
            )
            self.say(
                f"[record {index}] {result['rows']:,} rows, {result['positions']:,} positions, "
                f"{result['bytes'] / max(result['positions'], 1):.1f} bytes a position, {time.monotonic() - started:.1f} s"
            )

    def check_recordings(self) -> None:
        """Refuse, before any weight is loaded, to train on a recording that is missing or of something else."""
        from transmla.recover.topk import RecordedTeacher, check_inputs

        for index, stage in enumerate(self.recipe.recover):
            if is_recorded(stage) and not self._is_current(self.stage_folder(index), self.digests.stage(index)):
                key, folder = f"recover.{index}.record", self.recording_folder(index)
                recorded = RecordedTeacher(folder, key)
                check_inputs(folder, recorded.index, key, settings=self.digests.recording(index))
                have = sum(len(shard["rows"]) for shard in recorded.index["shards"])
                processes = self.state.num_processes
                needed = min(steps_of(stage, processes) * rows_of_a_step(stage) * processes, recorded.index["data_rows"])
                if have < needed:
                    raise RecipeError(
                        key, f"{have:,} rows are recorded, training needs {needed:,}; run transmla record again, with more tokens "
                        "where one step of all processes is longer than the budget",
                    )

    def _read_recording(self, index: int, trainer: DistillTrainer) -> None:
        """Make a stage's trainer ask what was recorded, once that is seen to be of the trainer's own rows."""
        from transmla.recover.losses import Kept
        from transmla.recover.rows import ROW, carry_rows
        from transmla.recover.topk import RecordedTeacher

        recorded = RecordedTeacher(self.recording_folder(index), f"recover.{index}.record")
        recorded.check(self.tokenizer, trainer.train_dataset)
        carry_rows(trainer)

        def kept(batch: dict[str, Any]) -> Kept:
            ids, logp = recorded.rows(batch[ROW])
            return Kept(ids.to(trainer.args.device), logp.to(trainer.args.device))

        trainer.recorded = kept
