"""The stage `convert`: the student before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from transmla.convert.conversion import Conversion, convert_model
from transmla.run.artifacts import current, make
from transmla.run.context import Run
from transmla.run.datasets import calibration_windows
from transmla.run.lineage import students_to_make

STATISTICS = "statistics.safetensors"  # beside every student: E|o|² of every source attention


def convert_where_needed(run: Run) -> None:
    """`convert`, unless a later student is there."""
    if -1 in students_to_make(run) or current(run, run.paths.converted, run.digests.convert):
        convert(run)
    else:
        run.say("[convert] not there, and not needed: a later student is current")


def convert(run: Run) -> None:
    """Calibrate, solve every layer, keep the student as `converted`."""
    if run.prepared.notice:
        run.say(f"[convert] {run.prepared.notice}")

    def build(scratch: Path, metadata: dict[str, Any]) -> None:
        windows = calibration_windows(run)
        done = convert_model(run.teacher, run.recipe.convert, windows)
        metadata |= {"tokens": windows.numel()} | done.describe()
        for line in done.notes():
            run.say(f"[convert] {line}")
        save_converted(run, done, scratch)

    make(run, run.paths.converted, run.digests.convert, "convert", build)


def save_student(run: Run, student: PreTrainedModel, folder: Path) -> None:
    """A student in its own class, with the source's tokenizer."""
    student.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def save_converted(run: Run, done: Conversion, folder: Path) -> None:
    """The student, and E|o|² of every source attention."""
    save_student(run, done.student, folder)
    save_scales(done.output_scales, folder)


def save_scales(scales: Sequence[float], folder: Path) -> None:
    """E|o|² of every source attention, by which layerwise errors are divided; beside every student, so that none needs
    the ones before it."""
    save_file({"output_mean_square": torch.tensor(scales, dtype=torch.float64)}, folder / STATISTICS)


def output_scales(folder: Path) -> list[float]:
    """E|o|² of every source attention, from beside a student."""
    return load_file(folder / STATISTICS)["output_mean_square"].tolist()
