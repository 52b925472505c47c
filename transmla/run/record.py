"""The stage `record`: the teacher's top-k log-probabilities for the stages whose teacher is recorded."""

from __future__ import annotations

import time

from transmla.errors import RecipeError
from transmla.recipe.stages import is_recorded
from transmla.recover.teachers.top_k import record_teacher
from transmla.run.context import Run
from transmla.run.datasets import training_data


def record(run: Run) -> None:
    """Record for every stage that wants it; what is there already is kept.

    Raises:
        RecipeError: several processes, or no such stage.
    """
    if run.state.num_processes > 1:
        raise RecipeError("record", "recording runs in one process; start it without a launcher")
    stages = [(index, stage) for index, stage in enumerate(run.recipe.recover) if is_recorded(stage)]
    if not stages:
        raise RecipeError("recover", "no stage has teacher: recorded; there is nothing to record")
    for index, stage in stages:
        run.say(f"[record {index}] ...")
        started = time.monotonic()
        result = record_teacher(
            run.paths.recording(index),
            stage,
            training_data(run, index),
            run.tokenizer,
            lambda: run.teacher,
            inputs={"settings": run.digests.recording(index)},
            vocabulary=run.prepared.config.vocab_size,
            key=f"recover.{index}.record",
            seed=run.recipe.seed,
            device=run.prepared.device,
            dtype=run.dtype,
        )
        per_position = result["bytes"] / max(result["positions"], 1)
        run.say(
            f"[record {index}] {result['rows']:,} rows, {result['positions']:,} positions, "
            f"{per_position:.1f} bytes per position, {time.monotonic() - started:.1f} s"
        )
