"""The stage `recover`: the stages of the recipe's `recover` list, each from the student of the one before."""

from __future__ import annotations

import gc
import os
import shutil
import time
from typing import Any

from transformers import PreTrainedModel

from transmla.data.rows import ROW, carry_rows
from transmla.hardware import peak_memory, reset_peak_memory
from transmla.plan.memory import step_memory
from transmla.recipe.stages import AnyStage, is_recorded, other_teacher
from transmla.recover.distill import DistillTrainer
from transmla.recover.losses import Kept
from transmla.recover.on_policy import train_on_policy
from transmla.recover.stage import build_trainer, run_stage, tensorboard_folder, trainer_config
from transmla.recover.teachers.shards import RecordedTeacher
from transmla.run.artifacts import current, is_current, publishing, save_recipe, versions
from transmla.run.context import Run
from transmla.run.convert import output_scales, save_student
from transmla.run.datasets import training_data
from transmla.sources.fetch import fetch
from transmla.sources.local_model import load_model


def recover(run: Run) -> None:
    """Train every stage that is not current; an interrupted one goes on from its last checkpoint."""
    for index, stage in enumerate(run.recipe.recover):
        _keep_earlier_result(run, index)
        label = f"recover.{index} {stage.kind}"
        if current(run, run.paths.stage(index), run.digests.stage(index)):
            run.say(f"[{label}] unchanged, skipped")
        else:
            _recover_stage(run, index, label)


def _keep_earlier_result(run: Run, index: int) -> None:
    """A recipe that was lengthened: what was `recovered` is now an earlier stage, and still good."""
    folder, digest = run.paths.stage(index), run.digests.stage(index)
    if folder == run.paths.recovered or not current(run, run.paths.recovered, digest):
        return
    if run.state.is_main_process and not is_current(folder, digest):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(run.paths.recovered, folder)
    run.state.wait_for_everyone()


def _recover_stage(run: Run, index: int, label: str) -> None:
    digest = run.digests.stage(index)
    _open_checkpoints(run, index, digest)
    run.say(f"[{label}] ...")
    started = time.monotonic()
    reset_peak_memory(run.prepared.device)
    student = load_model(run.paths.stage(index - 1), run.dtype, run.device)
    with tensorboard_folder(run.paths.logs):
        result = _train(run, index, label, student)
    if run.state.is_main_process:
        metadata = {"name": label, "fingerprint": digest, "versions": versions(), **result}
        metadata["processes"] = run.state.num_processes
        with publishing(run.paths.stage(index), metadata) as scratch:
            save_recipe(run.recipe, scratch)
            save_student(run, student, scratch)
            metadata["seconds"] = round(time.monotonic() - started, 1)
            metadata["peak_memory_bytes"] = peak_memory(run.prepared.device)
        run.say(f"[{label}] {metadata['seconds']} s")
        shutil.rmtree(run.paths.checkpoints(index))
    run.state.wait_for_everyone()
    del student
    gc.collect()


def _open_checkpoints(run: Run, index: int, digest: str) -> None:
    """The folder of a stage's checkpoints, without those of other settings or of another number of processes."""
    if run.state.is_main_process:
        folder = run.paths.checkpoints(index)
        marker, wanted = folder / "fingerprint", f"{digest} {run.state.num_processes}"
        if folder.is_dir() and (not marker.is_file() or marker.read_text() != wanted):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(wanted)
    run.state.wait_for_everyone()


def _train(run: Run, index: int, label: str, student: PreTrainedModel) -> dict[str, Any]:
    """Train a student in place; what its metadata keeps: tokens, log, the checkpoint that it went on from."""
    stage, data, folder = run.recipe.recover[index], training_data(run, index), run.paths.checkpoints(index)
    settings: dict[str, Any] = {
        "seed": run.recipe.seed,
        "device": run.prepared.device,
        "dtype": run.dtype,
        "processes": run.state.num_processes,
    }
    if stage.kind == "on_policy":
        key = f"recover.{index}.data"
        return train_on_policy(stage, student, run.teacher, run.tokenizer, data, folder, key=key, **settings)
    config = trainer_config(stage, folder, **settings)
    if stage.kind == "distill" and stage.keep_teacher and run.state.num_processes > 1:
        run.say(
            f"[{label}] keep_teacher is for one process; of {run.state.num_processes}, the teacher reads every batch"
        )
    trainer = build_trainer(
        stage,
        student,
        _teacher_of(run, stage),
        run.tokenizer,
        config,
        data,
        scales=output_scales(run),
        reserve=_reserved_memory(run, stage),
        key=f"recover.{index}",
    )
    if isinstance(trainer, DistillTrainer) and is_recorded(stage):
        _read_recording(run, index, trainer)
    return run_stage(trainer, run.dtype)


def _teacher_of(run: Run, stage: AnyStage) -> PreTrainedModel | None:
    """The model that a stage's loss asks, or None."""
    other = other_teacher(stage)
    if stage.kind == "sft" or is_recorded(stage) or other is not None:
        run.release_teacher()
    if stage.kind == "sft" or is_recorded(stage):
        return None
    return run.teacher if other is None else load_model(fetch(other), run.dtype, run.device)


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
