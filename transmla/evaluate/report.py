"""report.json, report.md and figures from the records of the artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transmla.artifacts import read_record, write_whole
from transmla.evaluate.written import collect_written, written_lines
from transmla.evaluate.figures import draw_tasks, error_bars
from transmla.evaluate.summary import answer_lines, check_thresholds, compare_tasks, recovered
from transmla.evaluate.tables import quality_table, recovered_table, task_tables, threshold_table
from transmla.evaluate.tasks import Answers, read_answers
from transmla.geometry import MLAGeometry
from transmla.recipe import Recipe

MODELS = ("teacher", "converted", "recovered", "exported")


def collect(recipe: Recipe, geometry: MLAGeometry, artifacts: dict[str, Path]) -> dict[str, Any]:
    """The content of report.json.

    Args:
        artifacts: folders of the current artifacts by stage: `convert`, `recover.N KIND`, `export`, `evaluate MODEL`.
    """
    records = {name: read_record(folder) for name, folder in artifacts.items()}
    stages, logs = [], []
    versions: dict[str, str] = {}
    for name, record in records.items():
        assert record is not None, f"{name} is current, so it has a record"
        versions |= record["versions"]
        stages.append(
            {
                "name": name,
                "seconds": record["seconds"],
                "tokens": record.get("tokens", 0),
                "peak_memory_gib": round(record["peak_memory_bytes"] / 2**30, 2),
            }
        )
        if "log" in record:
            logs.append({"name": name, "log": record["log"]})
    evaluations = {name: records[f"evaluate {name}"] for name in MODELS if f"evaluate {name}" in records}
    exported = records.get("export")
    tasks = {name: record["tasks"] for name, record in evaluations.items() if "tasks" in record}
    report = {
        "recipe": recipe.name,
        "source": recipe.model.source,
        "geometry": records.get("convert", {}).get("geometry") or geometry.describe(),
        "stages": stages,
        "quality": {name: record["quality"] for name, record in evaluations.items()},
        "tasks": compare_tasks(tasks, collect_answers(artifacts)),
        "layer_errors": {name: record["layer_errors"] for name, record in evaluations.items() if "layer_errors" in record},
        "continuations": {name: record["continuations"] for name, record in evaluations.items() if record.get("continuations")},
        "export": None
        if exported is None
        else {
            "path": str(artifacts["export"]),
            "format": exported["format"],
            "max_abs_logprob_diff": exported["max_abs_logprob_diff"],
        },
        "key_regression_error": (records.get("convert") or {}).get("key_regression_error"),
        "training": logs,
        "versions": versions,
        "seed": recipe.seed,
        **collect_written(records),
    }
    report["recovered"] = recovered(report)
    report["required"] = check_thresholds(recipe.evaluate.require, report)
    return report


def collect_answers(artifacts: dict[str, Path]) -> dict[str, dict[str, Answers]]:
    """By model, its answers to the questions with choices, for the models that were asked. artifacts: as in `collect`."""
    folders = {name: artifacts[f"evaluate {name}"] for name in MODELS if f"evaluate {name}" in artifacts}
    return {name: answers for name, folder in folders.items() if (answers := read_answers(folder))}


def render(report: dict[str, Any]) -> str:
    """The content of report.md."""
    g = report["geometry"]
    lines = [
        f"# {report['recipe']}: {report['source']}",
        "",
        f"{g['cached_values_source']} cached values a token and layer became {g['cached_values_student']} "
        f"(rope {g['qk_rope_head_dim']} + latent {g['kv_lora_rank']}): {g['saving_percent']} % less.",
        "",
    ]
    if report["key_regression_error"]:
        errors = report["key_regression_error"]
        lines += [
            f"Keys pass a norm in the source and are linear in the student: {100 * sum(errors) / len(errors):.1f} % of "
            f"their variance on the calibration text is not explained before recovery ({100 * min(errors):.1f} to {100 * max(errors):.1f} % by "
            "layer).",
            "",
        ]
    for dataset in next(iter(report["quality"].values()), {}):
        lines += quality_table(report, dataset)
    lines += task_tables(report["tasks"])
    lines += recovered_table(report["recovered"])
    lines += threshold_table(report["required"])
    if report["export"]:
        export = report["export"]
        loader = "stock transformers" if export["format"] == "deepseek_v3" else "`import transmla`"
        lines += [
            "## Export",
            "",
            f"`{export['path']}` ({export['format']}): a fresh process with {loader} gives the recovered "
            f"student's log-probabilities to {export['max_abs_logprob_diff']:.1e}.",
            "",
        ]
    lines += written_lines(report)
    for prompt in next(iter(report["continuations"].values()), {}):
        lines += [f"> {prompt} ...", ""]
        lines += [f"- {name}: {' '.join(texts[prompt].split())}" for name, texts in report["continuations"].items()]
        lines.append("")
    lines += ["## Stages", "", "| stage | seconds | tokens | peak memory |", "|---|---|---|---|"]
    lines += [
        f"| {stage['name']} | {stage['seconds']} | {stage['tokens']:,} | {stage['peak_memory_gib']} GiB |"
        for stage in report["stages"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += ["", f"Seed {report['seed']}; {versions}. Figures: `figures/`.", ""]
    return "\n".join(lines)


def write_report(out: Path, recipe: Recipe, geometry: MLAGeometry, artifacts: dict[str, Path]) -> dict[str, Any]:
    """Write report.json, report.md, figures/*.png and answers.jsonl below `out`; returns the report."""
    report = collect(recipe, geometry, artifacts)
    write_whole(out / "report.json", json.dumps(report, indent=1))
    write_whole(out / "report.md", render(report))
    draw_figures(report, out / "figures")
    if report["tasks"]:
        write_whole(out / "answers.jsonl", answer_lines(collect_answers(artifacts)))
    else:
        (out / "answers.jsonl").unlink(missing_ok=True)
    return report


def draw_figures(report: dict[str, Any], folder: Path) -> None:
    """loss.png, quality.png, tasks.png, layers.png; a figure without data is not drawn."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    folder.mkdir(parents=True, exist_ok=True)
    curves = [(entry["name"], [line for line in entry["log"] if "loss" in line]) for entry in report["training"]]
    curves = [(name, lines) for name, lines in curves if lines]
    if curves:
        figure = Figure(figsize=(5 * len(curves), 3.4), layout="constrained")
        for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
            loss = "normalised attention error" if "layerwise" in name else "loss, nats a token"
            axes.set(title=f"{name}, training loss", xlabel="step", ylabel=loss, ylim=(0, None))
        figure.savefig(folder / "loss.png", dpi=120)
    quality = report["quality"]
    if quality:
        names, datasets = list(quality), list(next(iter(quality.values())))
        figure = Figure(figsize=(9, 3.2 * len(datasets)), layout="constrained")
        grid = figure.subplots(len(datasets), 2, squeeze=False)
        for row, dataset in zip(grid, datasets, strict=True):
            for axes, key in zip(row, ("kl", "perplexity"), strict=True):
                values = [quality[name][dataset][key] for name in names]
                bounds = [quality[name][dataset][f"{key}_interval"] or (quality[name][dataset][key],) * 2 for name in names]
                bars = axes.bar(names, values, yerr=error_bars(values, bounds), capsize=3, color="tab:blue", width=0.6)
                axes.bar_label(bars, fmt="%.3g")
                axes.set(title=dataset, ylabel={"kl": "KL to teacher, nats a token"}.get(key, key))
                axes.margins(y=0.15)
        figure.savefig(folder / "quality.png", dpi=120)
    draw_tasks(report["tasks"], folder)
    if report["layer_errors"]:
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, errors in report["layer_errors"].items():
            axes.plot(range(len(errors)), errors, marker="o", markersize=3, label=name)
        axes.set(xlabel="layer", ylabel="normalised attention error", ylim=(0, None), title="error by layer, held-out window")
        axes.legend()
        figure.savefig(folder / "layers.png", dpi=120)
