"""The stage `convert`: the student before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from transmla.convert.conversion import Conversion, convert_model
from transmla.run.artifacts import make
from transmla.run.context import Run
from transmla.run.datasets import calibration_windows

STATISTICS = "statistics.safetensors"  # beside the converted student: E|o|² of every source attention


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
    """The student, and E|o|² of every source attention, by which layerwise errors are divided."""
    save_student(run, done.student, folder)
    scales = torch.tensor(done.output_scales, dtype=torch.float64)
    save_file({"output_mean_square": scales}, folder / STATISTICS)


def output_scales(run: Run) -> list[float]:
    """E|o|² of every source attention, as the conversion measured it."""
    return load_file(run.paths.converted / STATISTICS)["output_mean_square"].tolist()
