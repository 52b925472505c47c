"""The stage `recover`: the stages of the recipe's `recover` list, each from the student of the one before."""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from transmla.data.rows import ROW, carry_rows
from transmla.errors import RecipeError
from transmla.files import remove, save_whole
from transmla.hardware import peak_memory, reset_peak_memory
from transmla.plan.memory import step_memory
from transmla.recipe.launch_file import IN_PARTS, layout
from transmla.recipe.stages import AnyStage, is_recorded, other_teacher
from transmla.recover.checkpoints import last_checkpoint
from transmla.recover.configuration import unchanged_configuration
from transmla.recover.distill import DistillTrainer
from transmla.recover.losses import Kept
from transmla.recover.on_policy import train_on_policy
from transmla.recover.origin import Origin
from transmla.recover.stage import build_trainer, run_stage, tensorboard_folder, trainer_config
from transmla.recover.teachers.shards import RecordedTeacher
from transmla.run.artifacts import agreed, publishing, require_unharmed, save_recipe, unchanged, versions
from transmla.run.context import Run
from transmla.run.convert import save_student
from transmla.run.datasets import rows_of, training_data
from transmla.run.lineage import students_to_make
from transmla.run.statistics import output_scales, router_shifts, save_statistics
from transmla.sources.fetch import fetch
from transmla.sources.local_model import load_model, load_source


def ask_for_rows(run: Run) -> None:
    """Have the rows of coming stages made beside the run: those whose text is there, where that helps."""
    for index in sorted(students_to_make(run) - {-1}):
        if run.rows_ahead is None or index in run.rows_ahead.asked:
            continue
        wanted = rows_of(run, index)
        if wanted is not None:
            run.rows_ahead.ask(wanted)


def recover(run: Run) -> None:
    """Train every stage that a later result needs; an interrupted one goes on from its last whole checkpoint."""
    wanted = students_to_make(run)
    for index, stage in enumerate(run.recipe.recover):
        label, folder = f"recover.{index} {stage.kind}", run.paths.stage(index)
        if not unchanged(run, folder, run.digests.stage(index), label):
            if index in wanted:
                _recover_stage(run, index, label)
            else:
                run.say(f"[{label}] not there, and not needed: a later student is current")
        if run.state.is_main_process:
            remove(run.paths.checkpoints(index))  # also those of a run that was killed before it could
            with suppress(OSError):  # not empty: later stages have some, or not there
                run.paths.checkpoints(index).parent.rmdir()
        run.state.wait_for_everyone()
    run.end_rows_ahead()


def _recover_stage(run: Run, index: int, label: str) -> None:
    digest, before = run.digests.stage(index), run.paths.stage(index - 1)
    origin = _open_checkpoints(run, index, label)
    run.say(f"[{label}] ...")
    started = time.monotonic()
    reset_peak_memory(run.prepared.device)
    agreed(run, lambda: require_unharmed(before))
    student = load_model(before, run.dtype, run.device)
    scales = output_scales(before)
    with tensorboard_folder(run.paths.logs):
        result = _train(run, index, label, student, scales, origin)
    if layout() in IN_PARTS:
        run.release_teacher()  # it is in shards
    if run.state.is_main_process:
        metadata = {"name": label, "fingerprint": digest, "versions": versions(), **result}
        metadata["processes"] = run.state.num_processes
        with publishing(run.paths.stage(index), metadata) as scratch:
            save_recipe(run.recipe, scratch)
            save_student(run, student, scratch)
            save_statistics(scales, router_shifts(before), scratch)
            metadata["seconds"] = round(time.monotonic() - started, 1)
            metadata["peak_memory_bytes"] = peak_memory(run.prepared.device)
        run.say(f"[{label}] {metadata['seconds']} s")
    run.state.wait_for_everyone()
    del student
    gc.collect()


def _open_checkpoints(run: Run, index: int, label: str) -> Origin:
    """What a stage goes on from. Checkpoints of other settings, or of another number of processes that replicate, are
    removed.

    Raises:
        RecipeError: they are of another launch file, or of a number of processes that these cannot go on from.
    """
    folder = run.paths.checkpoints(index)
    marker, digest, present = folder / "fingerprint", run.digests.stage(index), run.state.num_processes

    def look() -> Origin:
        written = marker.read_text(errors="replace").split() if marker.is_file() else []
        before, count, way = written if len(written) == 3 else ("", "0", "")
        known = before == digest and count.isdecimal()
        if folder.exists() and known and any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) and way != layout():
            raise RecipeError(
                "launch",
                f"{folder} has checkpoints of {count} processes in the layout {way}, this is {layout()}; start as "
                "before, or delete that folder to train the stage anew",
            )
        if folder.exists() and not (known and (int(count) == present or layout() != "whole")):
            run.say(f"[{label}] {folder} is of other settings, or of another number of processes; it is removed")
            remove(folder)
            known = False
        folder.mkdir(parents=True, exist_ok=True)
        origin = Origin(None, int(count) if known else present)
        if origin.processes != present:
            origin.accumulation(run.recipe.recover[index], present, folder, f"recover.{index}")
        save_whole(marker, f"{digest} {origin.processes} {layout()}")
        found = last_checkpoint(folder, lambda text: run.say(f"[{label}] {text}"))
        return replace(origin, checkpoint=found)

    return agreed(run, look)


def _train(
    run: Run, index: int, label: str, student: PreTrainedModel, scales: list[float], origin: Origin
) -> dict[str, Any]:
    """Train a student in place; what its metadata keeps: tokens, log, the checkpoint that it went on from."""
    _wait_for_rows(run, index, label)
    stage, data, folder = run.recipe.recover[index], training_data(run, index), run.paths.checkpoints(index)
    stage, checkpoint = origin.same_batches(stage, run.state.num_processes), origin.checkpoint
    settings: dict[str, Any] = {
        "seed": run.recipe.seed,
        "device": run.prepared.device,
        "dtype": run.dtype,
        "processes": run.state.num_processes,
    }
    key = f"recover.{index}"
    if stage.kind == "on_policy":
        models = student, run.teacher
        return train_on_policy(stage, *models, run.tokenizer, data, folder, checkpoint, key=key, **settings)
    config = trainer_config(stage, folder, **settings)
    if stage.kind == "distill" and stage.keep_teacher and run.state.num_processes > 1:
        run.say(
            f"[{label}] keep_teacher is for one process; of {run.state.num_processes}, the teacher reads every batch"
        )
    teacher = _teacher_of(run, index)
    with unchanged_configuration(student, teacher):
        trainer = build_trainer(
            stage,
            student,
            teacher,
            run.tokenizer,
            config,
            data,
            scales=scales,
            reserve=_reserved_memory(run, stage),
            key=key,
        )
        run.say(f"[{label}] {trainer.means}")
        if isinstance(trainer, DistillTrainer) and is_recorded(stage):
            _read_recording(run, index, trainer)
        return run_stage(trainer, run.dtype, checkpoint, key=key)


def _wait_for_rows(run: Run, index: int, label: str) -> None:
    reason = None if run.rows_ahead is None else run.rows_ahead.wait(index)
    if reason is not None:
        run.say(f"[{label}] rows could not be made ahead: {reason}")
    if index == len(run.recipe.recover) - 1:
        run.end_rows_ahead()
        run.start_fresh_process()  # what the export needs next


def _teacher_of(run: Run, index: int) -> PreTrainedModel | None:
    """The model that the loss of stage `index` asks, or None."""
    stage, key = run.recipe.recover[index], f"recover.{index}.teacher"
    other = other_teacher(stage)
    if stage.kind == "sft" or is_recorded(stage) or other is not None:
        run.release_teacher()
    if stage.kind == "sft" or is_recorded(stage):
        return None
    if other is None:
        return run.teacher
    return load_source(fetch(other, key), run.dtype, run.device, f"{key}.source")


def _reserved_memory(run: Run, stage: AnyStage) -> int:
    """Rough bytes that a stage needs of a device besides the weights, which are on it when this is asked."""
    return step_memory(stage, run.prepared.sizes, run.prepared.config, run.dtype)


def _read_recording(run: Run, index: int, trainer: DistillTrainer) -> None:
    """Make a stage's trainer ask what was recorded, once that is seen to be of the trainer's own rows."""
    recorded = RecordedTeacher(run.paths.recording(index), f"recover.{index}.record")
    recorded.check(run.tokenizer, trainer.train_dataset)
    carry_rows(trainer)

    def kept(batch: dict[str, Any]) -> Kept:
        ids, logp = recorded.rows(batch[ROW])
        return Kept(ids.to(trainer.args.device), logp.to(trainer.args.device))

    trainer.recorded = kept
