"""The content of report.json, from the metadata of the artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transmla.geometry import MLAGeometry
from transmla.measure.tasks import Answers
from transmla.recipe.schema import Recipe
from transmla.report.generated_text import collect_written
from transmla.report.summary import check_thresholds, compare_tasks, recovered

MODELS = ("teacher", "converted", "recovered", "exported")


def collect(
    recipe: Recipe,
    geometry: MLAGeometry,
    metadata: dict[str, dict[str, Any]],
    *,
    answers: dict[str, dict[str, Answers]],
    exported: Path,
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        metadata: of the current artifacts by stage: `convert`, `recover.N KIND`, `export`, `evaluate MODEL`, ...
        answers: by model and task, of the models that were asked questions with choices.
        exported: folder of the final checkpoint.
    """
    stages, logs = [], []
    versions: dict[str, str] = {}
    for name, own in metadata.items():
        versions |= own["versions"]
        stages.append(
            {
                "name": name,
                "seconds": own["seconds"],
                "tokens": own.get("tokens", 0),
                "peak_memory_gib": round(own["peak_memory_bytes"] / 2**30, 2),
            }
            | {key: own[key] for key in ("computed_by", "checkpoints") if key in own}
        )
        if "log" in own:
            logs.append({"name": name, "log": own["log"]})
    evaluations = {name: metadata[f"evaluate {name}"] for name in MODELS if f"evaluate {name}" in metadata}
    export, conversion = metadata.get("export"), metadata.get("convert", {})
    tasks = {name: own["tasks"] for name, own in evaluations.items() if "tasks" in own}
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "source": recipe.model.source,
        "geometry": conversion.get("geometry") or geometry.describe(),
        "stages": stages,
        "quality": {name: own["quality"] for name, own in evaluations.items()},
        "tasks": compare_tasks(tasks, answers),
        "layer_errors": {name: own["layer_errors"] for name, own in evaluations.items() if "layer_errors" in own},
        "continuations": {name: own["continuations"] for name, own in evaluations.items() if own.get("continuations")},
        "left_out": sorted({key for own in evaluations.values() for key in own.get("left_out", ())}),
        "export": None
        if export is None
        else {
            "path": str(exported),
            "format": export["format"],
            "notes": export["notes"],
            "engines": export.get("engines", {}),  # none in what was exported before they were looked at
            "max_abs_logprob_diff": export["max_abs_logprob_diff"],
        },
        "key_regression_error": conversion.get("key_regression_error"),
        **({"router_error": conversion["router_error"]} if "router_error" in conversion else {}),
        "training": logs,
        "versions": versions,
        "seed": recipe.seed,
        **collect_written(metadata),
    }
    report["recovered"] = recovered(report)
    report["required"] = check_thresholds(recipe.evaluate.require, report)
    return report
