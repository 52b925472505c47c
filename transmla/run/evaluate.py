"""The stage `evaluate`: quality of every model that is there, then the report."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from transmla.errors import RecipeError
from transmla.generate.prompts import ProblemPrompts
from transmla.generate.sampler import ModelSampler, Sampler
from transmla.measure.attention_errors import layer_errors
from transmla.measure.continuations import continue_prompts
from transmla.measure.perplexity import compare_with_reference, reference_of
from transmla.measure.solved import prompts_of, score
from transmla.measure.tasks import Answers, answer_tasks
from transmla.recipe.writing import Solve
from transmla.report.collect import MODELS
from transmla.report.model_card import CARD, save_card
from transmla.report.render import save_report
from transmla.report.summary import figure_lines, missed
from transmla.run.artifacts import agreed, condition, is_current, make, read_metadata, require_unharmed
from transmla.run.context import Run
from transmla.run.datasets import evaluation_windows
from transmla.run.export import MAKING
from transmla.run.paths import reference_file
from transmla.run.provenance import provenance
from transmla.run.sampled_batches import SampledBatches, all_of, sample_missing
from transmla.run.statistics import output_scales
from transmla.run.streamed_evaluation import evaluate_streamed
from transmla.run.write import require_room
from transmla.sources.local_model import load_model

ANSWERS = "answers.json"  # what a model answered, question by question, beside its metadata


def evaluate(run: Run) -> None:
    """Evaluate the models that are there and of the recipe's present settings, and write the report."""
    for name in _current_models(run):

        def build(scratch: Path, metadata: dict[str, Any], name: str = name) -> None:
            if run.prepared.evaluation.on:
                evaluate_streamed(run, name, scratch, metadata)
            else:
                _evaluate_model(run, name, scratch, metadata)
                metadata["solve"] = _score_replies(run, name)
            for line in figure_lines(metadata):
                run.say(f"[evaluate {name}] {line}")

        label = f"evaluate {name}"
        make(run, run.paths.evaluation(name), run.digests.evaluation(name), label, build, partial(_reply, run, name))
    found: list[list[str]] = [[]]
    if run.state.is_main_process:
        artifacts = _current_artifacts(run)
        metadata = {stage: read_metadata(folder) or {} for stage, folder in artifacts.items()}
        answers = {name: _read_answers(run, name) for name in MODELS if f"evaluate {name}" in artifacts}
        report = save_report(
            run.paths.root,
            run.recipe,
            run.prepared.geometry,
            metadata,
            answers={name: found for name, found in answers.items() if found},
            exported=run.paths.exported,
            provenance=provenance(run.recipe, run.prepared.device, run.prepared.replaced),
        )
        run.say((run.paths.root / "report.md").read_text())
        if "export" in metadata and not save_card(run.paths.exported, report, metadata["export"], run.recipe):
            run.say(f"[evaluate] {run.paths.exported / CARD} was edited and is left as it is")
        found = [missed(report)]
    run.missed = broadcast_object_list(found)[0]


def _model_of(run: Run, name: str) -> PreTrainedModel:
    """The teacher, or a student or exported model from its folder."""
    if name == "teacher":
        return run.teacher
    require_unharmed(run.paths.root / name)
    return load_model(run.paths.root / name, run.dtype, run.device)


def _current_models(run: Run) -> list[str]:
    """The models that are there and of the recipe's present settings.

    Raises:
        RecipeError: one of them is damaged.
    """
    digests = {"converted": run.digests.convert, "exported": run.digests.export}
    if run.recipe.recover:
        digests["recovered"] = run.digests.student
    folders = {name: run.paths.root / name for name in MODELS if name in digests}

    def look() -> list[str]:
        there = []
        for name, folder in folders.items():
            state = condition(folder, digests[name])
            if state.damage is not None:
                raise RecipeError("output_dir", f"{folder} is damaged: {state.damage}; run {MAKING} first")
            if state.current:
                there.append(name)
            else:
                run.say(f"[evaluate {name}] missing or of other settings, left out")
        return there

    return ["teacher", *agreed(run, look)]


def _current_artifacts(run: Run) -> dict[str, Path]:
    """Folders of all artifacts that belong to the present settings, by the name of their stage."""
    paths, digests = run.paths, run.digests
    wanted = {
        f"write {entry.name}": (paths.written(entry.name), digests.written(entry.name)) for entry in run.recipe.write
    }
    wanted["convert"] = (paths.converted, digests.convert)
    for index, stage in enumerate(run.recipe.recover):
        wanted[f"recover.{index} {stage.kind}"] = (paths.stage(index), digests.stage(index))
    wanted["export"] = (paths.exported, digests.export)
    for name in MODELS:
        wanted[f"evaluate {name}"] = (paths.evaluation(name), digests.evaluation(name))
    return {name: folder for name, (folder, digest) in wanted.items() if is_current(folder, digest)}


def _evaluate_model(run: Run, name: str, scratch: Path, metadata: dict[str, Any]) -> None:
    """Quality, answers and continuations of one model; the teacher's states, with which the others are compared, are
    kept beside its metadata."""
    section = run.recipe.evaluate
    model = _model_of(run, name)
    if name != "teacher":
        require_unharmed(run.paths.evaluation("teacher"))
    quality = {}
    for dataset in section.data:
        if name == "teacher":
            windows = evaluation_windows(run, dataset)
            reference = reference_of(model, windows, section.batch_size, f"teacher on {dataset}")
            save_file(reference, reference_file(scratch, dataset))
        else:
            reference = load_file(reference_file(run.paths.evaluation("teacher"), dataset))
        known = reference["hidden"] if name == "teacher" else None
        found = compare_with_reference(model, reference, section.batch_size, f"{name} on {dataset}", hidden=known)
        quality[dataset] = asdict(found)
    metadata["quality"] = quality
    if section.tasks:
        answers = answer_tasks(model, run.tokenizer, section, name)
        content = {label: asdict(found) for label, found in answers.items()}
        (scratch / ANSWERS).write_text(json.dumps(content))
        metadata["tasks"] = {label: found.summary() for label, found in answers.items()}
    if name in ("teacher", "exported"):
        metadata["continuations"] = continue_prompts(model, run.tokenizer, section)
    else:
        reference = load_file(reference_file(run.paths.evaluation("teacher"), section.data[0]))
        metadata["layer_errors"] = layer_errors(
            run.teacher, model, reference["windows"][:1], output_scales(run.paths.root / name)
        )


def _read_answers(run: Run, name: str) -> dict[str, Answers]:
    """What a model answered, by task; empty for an evaluation without tasks."""
    file = run.paths.evaluation(name) / ANSWERS
    if not file.is_file():
        return {}
    return {label: Answers(**fields) for label, fields in json.loads(file.read_text()).items()}


def _replies(run: Run, name: str, entry: Solve) -> tuple[ProblemPrompts, SampledBatches]:
    """The prompts of an entry of `evaluate.solve` and where the replies of a model are kept."""
    asked = prompts_of(run.exams[entry.name], entry, run.tokenizer)
    return asked, SampledBatches(run.paths.replies(name, entry.name), run.digests.replies(name, entry.name))


def _reply(run: Run, name: str) -> None:
    """Have a model reply to the problems of `evaluate.solve`, on all processes."""
    if run.prepared.evaluation.on:
        return  # nothing is generated by a model that is read layer by layer
    loaded: list[PreTrainedModel] = []

    def sampler() -> Sampler:
        if not loaded:
            loaded.append(_model_of(run, name))
        return ModelSampler(loaded[0], run.tokenizer)

    for index, entry in enumerate(run.recipe.evaluate.solve):
        asked, batches = _replies(run, name, entry)
        require_room(run, asked, entry, f"evaluate.solve.{index}")
        sample_missing(
            batches,
            sampler,
            asked.prompts_of,
            all_of(len(asked.plan)),
            entry,
            seed=run.recipe.seed,
            name=entry.name,
            state=run.state,
        )


def _score_replies(run: Run, name: str) -> dict[str, Any]:
    """The accuracies of a model whose replies are there, by name of the entry."""
    found = {}
    for entry in run.recipe.evaluate.solve:
        asked, batches = _replies(run, name, entry)
        samples = asked.ordered(batches.samples(batch) for batch in range(len(asked.plan)))
        found[entry.name] = score(asked, samples) | {"sampling_seconds": batches.seconds()}
    return found
