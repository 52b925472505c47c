"""The stage `convert`: the student before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from transmla.convert.conversion import Conversion, Findings, convert_model
from transmla.convert.streaming import StreamedConversion, stream_conversion
from transmla.hardware import peak_memory
from transmla.run.artifacts import current, make
from transmla.run.context import Run
from transmla.run.datasets import calibration_windows
from transmla.run.lineage import students_to_make
from transmla.run.statistics import save_statistics
from transmla.sources.layered_model import save_configuration
from transmla.sources.weight_shards import WeightShards


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
        run.prepared.streaming.require()
        windows = calibration_windows(run)
        done: Findings
        if run.prepared.streaming.on:
            done = stream_converted(run, windows, scratch)
            metadata["streamed"] = _streaming_cost(run, done)
        else:
            done = convert_model(run.teacher, run.recipe.convert, windows)
            save_converted(run, done, scratch)
        metadata |= {"tokens": windows.numel()} | done.describe()
        for line in done.notes():
            run.say(f"[convert] {line}")

    make(run, run.paths.converted, run.digests.convert, "convert", build)


def stream_converted(run: Run, windows: Tensor, folder: Path) -> StreamedConversion:
    """Convert layer by layer and write every part of the student when it is ready: what `save_converted` saves, in
    several files."""
    run.say(f"[convert] layer by layer, because {run.prepared.streaming.reason}")
    run.release_teacher()  # text may have been written with it
    source, weights = run.stream_source(), WeightShards(folder)
    done = stream_conversion(source, run.recipe.convert, windows, weights.add)
    weights.close()
    done.student.generation_config = source.model.generation_config
    save_configuration(done.student, folder)
    run.tokenizer.save_pretrained(folder)
    save_statistics(done.output_scales, done.router_shifts, folder)
    return done


def _streaming_cost(run: Run, done: StreamedConversion) -> dict[str, Any]:
    """Seconds by layer and peaks of memory, for the log and the artifact's metadata."""
    devices = {"host": "cpu"} | ({"gpu": "cuda"} if run.prepared.device == "cuda" else {})
    peaks = {f"peak_{name}_bytes": peak_memory(device) for name, device in devices.items()}
    shown = ", ".join(
        f"{size / 2**30:.1f} GiB of the {name}" for name, size in zip(devices, peaks.values(), strict=True)
    )
    seconds = sum(done.seconds) / len(done.seconds)
    run.say(f"[convert] {len(done.seconds)} layers at {seconds:.1f} s; at most {shown}")
    return {"reason": run.prepared.streaming.reason, "seconds_by_layer": done.seconds} | peaks


def save_student(run: Run, student: PreTrainedModel, folder: Path) -> None:
    """A student in its own class, with the source's tokenizer."""
    student.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def save_converted(run: Run, done: Conversion, folder: Path) -> None:
    """The student, and what later stages need of the calibration."""
    save_student(run, done.student, folder)
    save_statistics(done.output_scales, done.router_shifts, folder)
