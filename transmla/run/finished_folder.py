"""`transmla verify DIR`: a finished output directory against itself; needs neither its source nor its data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig
from yaml import YAMLError

from transmla.errors import RecipeError
from transmla.export.fresh_process import model_on_disk
from transmla.export.reload_check import check_reload, log_probabilities, memory_of_check
from transmla.families import default_kernel
from transmla.files import PARTIAL, damage, read_json
from transmla.geometry import MLAGeometry
from transmla.hardware import free_memory
from transmla.measure.tasks import Answers
from transmla.recipe.schema import Recipe
from transmla.recipe.validation import validate_recipe
from transmla.report.collect import MODELS, collect
from transmla.run.artifacts import METADATA, read_metadata
from transmla.run.evaluate import ANSWERS
from transmla.run.paths import reference_file
from transmla.sources.config import read_config
from transmla.sources.local_model import load_model

REPORT = "report.json"
ROUNDED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Finding:
    """One line of the table. good: None where there was nothing to check."""

    what: str
    good: bool | None
    detail: str


def verify_folder(folder: Path) -> list[Finding]:
    """Every file against its manifest, report.json against the results, the export against the student.

    Raises:
        RecipeError: this is no directory of results.
    """
    if not folder.is_dir():
        raise RecipeError("verify", f"{folder} is no directory; name an output directory, or recipe=NAME")
    artifacts = {
        str(file.parent.relative_to(folder)): file.parent
        for file in sorted(folder.rglob(METADATA))
        if PARTIAL not in str(file.relative_to(folder))
    }
    if not artifacts and not (folder / REPORT).exists():
        raise RecipeError("verify", f"nothing below {folder} is a result of a recipe; name an output directory")
    found = [digests_of(name, place) for name, place in artifacts.items()]
    whole = {line.what for line in found if line.good}
    student = student_of(folder)
    found += [Finding(name, False, "missing") for name in ("exported", student) if name not in artifacts]
    found += _report(folder, {place: artifacts[place] for place in artifacts if place in whole})
    if {"exported", student} <= whole:
        found.append(_caught("scores of the export", lambda: _scores(folder, folder / student)))
    else:
        found.append(Finding("scores of the export", None, "not compared: files are missing or damaged"))
    return found


def table(found: list[Finding]) -> str:
    """Lines for a terminal."""
    width = max(len(line.what) for line in found)
    words = {True: "ok", False: "MISS", None: "-"}
    return "\n".join(f"{line.what:{width}}  {words[line.good]:4}  {line.detail}" for line in found)


def _caught(what: str, check: Callable[[], str]) -> Finding:
    """A check whose refusal is a line of the table."""
    try:
        return Finding(what, True, check())
    except RecipeError as error:
        return Finding(what, False, error.problem)


def digests_of(name: str, place: Path) -> Finding:
    if (reason := damage(place)) is not None:
        return Finding(name, False, reason)
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return Finding(name, True, f"{size / 2**20:,.1f} MiB as they were written")


def student_of(folder: Path) -> str:
    """Where the student lies that is exported: `recovered`, or `converted` of a recipe without recovery."""
    return "recovered" if _tree(folder).get("recover") else "converted"


def _tree(folder: Path) -> dict[str, Any]:
    """The recipe that is kept beside the last result, as a plain tree; empty where none can be read."""
    for name in ("exported", "recovered", "converted"):
        file = folder / name / "recipe.yaml"
        if file.is_file():
            try:
                tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            except (OmegaConfBaseException, YAMLError, UnicodeDecodeError):
                continue  # its folder's manifest says that it is damaged
            if isinstance(tree, dict):
                return {str(key): value for key, value in tree.items()}
    return {}


def _report(folder: Path, artifacts: dict[str, Path]) -> list[Finding]:
    """report.json, told again from the results that are there and whole."""
    report = read_json(folder / REPORT)
    if not isinstance(report, dict) or not isinstance(report.get("stages"), list):
        return [Finding(REPORT, False, "missing, or it cannot be read")]
    by_stage: dict[str, dict[str, Any]] = {}
    for place in artifacts.values():
        metadata = read_metadata(place) or {}
        by_stage[str(metadata.get("name"))] = metadata
    named = [str(stage.get("name")) for stage in report["stages"] if isinstance(stage, dict)]
    lost = [name for name in named if name not in by_stage]
    try:
        recipe = kept_recipe(folder)
        geometry = _geometry(report["geometry"])
        answers = {model: _answers(folder, model) for model in MODELS if f"evaluate {model}" in by_stage}
        told = collect(
            recipe,
            geometry,
            {name: by_stage[name] for name in named if name in by_stage},
            answers={model: own for model, own in answers.items() if own},
            exported=folder / "exported",
        )
    except RecipeError as error:
        return [Finding(REPORT, False, f"it cannot be told again: {error}")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # metadata or a report of another form
        return [Finding(REPORT, False, f"it cannot be told again: {type(error).__name__} {error}")]
    wrong = sorted(_differences(report, json.loads(json.dumps(told)), complete=not lost))
    detail = f"{len(named) - len(lost)} of {len(named)} results are there and say the same"
    lines = [Finding(REPORT, not wrong, f"{', '.join(wrong)} differ from the results" if wrong else detail)]
    missed = [entry for entry in report.get("required", []) if isinstance(entry, dict) and entry.get("met") is False]
    if report.get("required"):
        detail = f"{len(missed)} of {len(report['required'])} missed"
        lines.append(Finding("thresholds", not missed, detail))
    return lines


def _differences(report: dict[str, Any], told: dict[str, Any], *, complete: bool) -> list[str]:
    """Keys of the report that the results do not say. complete: whether all results are there, else those that are
    are compared one by one."""
    for content in (report, told):
        content["export"] = {key: value for key, value in (content.get("export") or {}).items() if key != "path"}
    if complete:
        return [key for key in told if key in report and _text(report[key]) != _text(told[key])]
    found = [key for key in ("quality", "layer_errors", "continuations") if not _within(told[key], report.get(key))]
    stages = {stage["name"]: stage for stage in report["stages"]}
    return found + [stage["name"] for stage in told["stages"] if _text(stage) != _text(stages[stage["name"]])]


def _within(part: dict[str, Any], whole: Any) -> bool:
    return isinstance(whole, dict) and all(_text(value) == _text(whole.get(key)) for key, value in part.items())


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)  # NaN is unlike itself


def kept_recipe(folder: Path) -> Recipe:
    return validate_recipe(_tree(folder))


def _geometry(fields: dict[str, Any]) -> MLAGeometry:
    known = {field.name for field in dataclasses.fields(MLAGeometry)}
    return MLAGeometry(**{key: value for key, value in fields.items() if key in known})


def _answers(folder: Path, model: str) -> dict[str, Answers]:
    found = read_json(folder / "evaluation" / model / ANSWERS) or {}
    return {label: Answers(**fields) for label, fields in found.items()}


def _scores(folder: Path, student: Path) -> str:
    """The export, loaded in a fresh process, gives the student's log-probabilities."""
    recipe, exported = kept_recipe(folder), folder / "exported"
    config = read_config(student, "output_dir")
    section, metadata = recipe.export.verify, read_metadata(exported) or {}
    tokens = kept_tokens(folder, recipe, config)
    stored = sum(file.stat().st_size for file in student.glob("model*.safetensors"))
    dtype = ROUNDED[str(config.dtype).removeprefix("torch.")]
    whole = memory_of_check(section, stored // dtype.itemsize, config)
    by_module = free_memory(torch.device("cpu")) < whole
    if by_module:
        model = model_on_disk(student, attn_implementation=default_kernel(config.model_type))
    else:
        model = load_model(student, torch.float32, "cpu")
    expected = log_probabilities(model, tokens)
    del model  # one model in memory at a time
    stock = metadata.get("format") == "deepseek_v3"
    wanted = recipe.export.dtype
    rounded = dtype if wanted == "auto" else ROUNDED[wanted]
    found = check_reload(exported, tokens, expected, section, rounded, stock=stock, by_module=by_module)
    return f"{tokens.numel()} tokens, largest difference of a log-probability {found:.2e}"


def kept_tokens(folder: Path, recipe: Recipe, config: PretrainedConfig) -> Tensor:
    """Text that the models were evaluated on, where it is kept, else tokens by the recipe's seed: [n, L]."""
    if (text := kept_text(folder, recipe)) is not None:
        return text
    generator = torch.Generator().manual_seed(recipe.seed)
    return torch.randint(config.vocab_size, _shape(recipe), generator=generator)


def kept_text(folder: Path, recipe: Recipe) -> Tensor | None:
    """Tokens [n, L] of text that the models were evaluated on, where it is kept."""
    rows, length = _shape(recipe)
    file = reference_file(folder / "evaluation" / "teacher", recipe.evaluate.data[0])
    if file.is_file() and "windows" in (kept := load_file(file)):
        return kept["windows"].long()[:rows, :length]
    return None


def _shape(recipe: Recipe) -> tuple[int, int]:
    """Rows and tokens of each in the check of an export."""
    length = min(recipe.export.verify.tokens, recipe.evaluate.max_length)
    return max(1, recipe.export.verify.tokens // length), length
