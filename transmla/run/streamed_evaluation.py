"""The quality of a model that does not fit in memory: its layers are read one at a time, and nothing is generated."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from transmla.measure.perplexity import compare
from transmla.measure.streamed_quality import LayerErrors, head_of, stream_hidden
from transmla.modeling.config_facts import final_softcap
from transmla.run.artifacts import require_unharmed
from transmla.run.context import Run
from transmla.run.datasets import evaluation_windows
from transmla.run.paths import reference_file
from transmla.run.statistics import output_scales
from transmla.sources.layered_model import LayeredModel
from transmla.sources.local_model import stream_model


def evaluate_streamed(run: Run, name: str, scratch: Path, metadata: dict[str, Any]) -> None:
    """KL, perplexity and top-1 of one model, and the errors of a student's attentions.

    The teacher's states, with which the others are compared, are kept beside its metadata.
    """
    section, streaming = run.recipe.evaluate, run.prepared.evaluation
    run.say(f"[evaluate {name}] layer by layer, because {streaming.reason}")
    if idle := section.generated:
        metadata["left_out"] = idle
        run.say(f"[evaluate {name}] {', '.join(idle)} left out: they need the whole model in memory")
    run.release_teacher()
    if name == "teacher":
        _evaluate_teacher(run, scratch, metadata)
    else:
        _evaluate_student(run, name, metadata)


def _evaluate_teacher(run: Run, scratch: Path, metadata: dict[str, Any]) -> None:
    teacher, section = run.stream_source(), run.recipe.evaluate
    windows = {dataset: evaluation_windows(run, dataset) for dataset in section.data}
    states = _states(run, teacher, list(windows.values()), "teacher")
    head = head_of(teacher)
    metadata["quality"] = {}
    for (dataset, rows), hidden in zip(windows.items(), states, strict=True):
        reference = {"windows": rows, "hidden": hidden.cpu().contiguous(), "head": head.cpu()}
        save_file(reference, reference_file(scratch, dataset))
        found = compare(rows, hidden, head, hidden, head, final_softcap(teacher.config))
        metadata["quality"][dataset] = asdict(found)


def _evaluate_student(run: Run, name: str, metadata: dict[str, Any]) -> None:
    section, folder = run.recipe.evaluate, run.paths.root / name
    require_unharmed(folder)
    require_unharmed(run.paths.evaluation("teacher"))
    student = stream_model(folder, run.dtype, run.device)
    files = [reference_file(run.paths.evaluation("teacher"), dataset) for dataset in section.data]
    windows = [load_file(file)["windows"] for file in files]
    errors = None
    if name != "exported":  # its attentions are DeepSeek's
        errors = LayerErrors(run.stream_source(), student, windows[0][:1], output_scales(folder))
    states = _states(run, student, windows, name, errors)
    head = head_of(student)
    metadata["quality"] = {}
    for dataset, file, hidden in zip(section.data, files, states, strict=True):
        reference = load_file(file)
        other = reference["head"].to(head.device)
        found = compare(reference["windows"], hidden, head, reference["hidden"], other, final_softcap(student.config))
        metadata["quality"][dataset] = asdict(found)
    if errors is not None:
        metadata["layer_errors"] = errors.found


def _states(
    run: Run, model: LayeredModel, windows: list[Tensor], label: str, errors: LayerErrors | None = None
) -> tuple[Tensor, ...]:
    """Final hidden states of the windows of every dataset; all of them pass a layer while it is in memory."""
    found = stream_hidden(model, torch.cat(windows), run.recipe.evaluate.batch_size, label, beside=errors)
    return found.split([len(rows) for rows in windows])
