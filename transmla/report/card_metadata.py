"""The block of YAML at the head of a model card, in the words that the hub understands."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

TAGS = ["transmla", "mla", "multi-head-latent-attention", "kv-cache"]
TASK = "text-generation"
MEASURES = {"perplexity": "perplexity", "kl": "KL to the source, nats per token"}


def front_matter(report: dict[str, Any], source: dict[str, Any]) -> str:
    """The YAML text, without the lines that enclose it.

    Args:
        report: the content of report.json. source: of the export's metadata; what it does not say is left out.
    """
    data = ModelCardData(
        base_model=source.get("hub"),
        base_model_relation="finetune" if "hub" in source else None,
        license=source.get("license"),
        license_name=source.get("license_name"),
        license_link=source.get("license_link"),
        language=source.get("language"),
        library_name="transformers",
        pipeline_tag=TASK,
        tags=[*TAGS, *(["distillation"] if any("distill" in stage["name"] for stage in report["stages"]) else [])],
        datasets=training_sets(report) or None,
        model_name=report["recipe"],
        eval_results=_results(report) or None,
    )
    return data.to_yaml()


def training_sets(report: dict[str, Any]) -> list[str]:
    """The hub's datasets that the model was converted, trained or written with, in order of the recipe."""
    entries = report.get("provenance", {}).get("hub", {})
    found = [entry["repository"] for key, entry in entries.items() if ": " in key and not key.startswith("evaluate.")]
    return list(dict.fromkeys(found))


def _results(report: dict[str, Any]) -> list[EvalResult]:
    """What was measured of the exported model. Not a number and infinite are no JSON, which the hub makes of it."""
    found = []
    for dataset, quality in report["quality"].get("exported", {}).items():
        for measure, title in MEASURES.items():
            found.append((dataset, measure, title, quality[measure]))
    for task, summary in report["tasks"].get("exported", {}).items():
        if summary["acc"] is not None:
            found.append((task, "accuracy", "accuracy", summary["acc"]))
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=measure,
            metric_name=title,
            metric_value=float(f"{value:.4g}"),
        )
        for dataset, measure, title, value in found
        if math.isfinite(value)
    ]
