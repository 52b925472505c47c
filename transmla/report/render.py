"""report.json, report.md, figures and answers of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transmla.convert.router_calibration import describe_routers
from transmla.files import save_whole
from transmla.geometry import MLAGeometry
from transmla.geometry.rotary import describe_stock_rope
from transmla.measure.tasks import Answers
from transmla.recipe.schema import Recipe
from transmla.report.collect import collect
from transmla.report.figures import plot_figures
from transmla.report.generated_text import written_lines
from transmla.report.summary import answer_lines
from transmla.report.tables import (
    engine_table,
    made_with,
    quality_table,
    ranks_table,
    recovered_table,
    task_tables,
    threshold_table,
)


def render(report: dict[str, Any]) -> str:
    """The content of report.md."""
    g = report["geometry"]
    lines = [
        f"# {report['recipe']}: {report['source']}",
        "",
        f"{g['cached_values_source']} cached values per token and layer became {g['cached_values_student']} "
        f"(rope {g['qk_rope_head_dim']} + latent {g['kv_lora_rank']}): {g['saving_percent']} % less.",
        "",
        *ranks_table(g),
    ]
    if g.get("stock_rope"):
        lines += [f"Rotary embedding, in place of the source's: {describe_stock_rope(g['stock_rope'])}.", ""]
    if report["key_regression_error"]:
        errors = report["key_regression_error"]
        lines += [
            f"Keys pass a norm in the source and are linear in the student: {100 * sum(errors) / len(errors):.1f} % of "
            f"their variance on the calibration text is not explained before recovery ({100 * min(errors):.1f} to "
            f"{100 * max(errors):.1f} % by "
            "layer).",
            "",
        ]
    if errors := report.get("router_error"):
        lines += [f"Experts: {describe_routers(errors)}.", ""]
    for dataset in next(iter(report["quality"].values()), {}):
        lines += quality_table(report, dataset)
    if report["left_out"]:
        lines += [f"Not measured, because models were read layer by layer: {', '.join(report['left_out'])}.", ""]
    lines += task_tables(report["tasks"])
    lines += ["Every answer: `answers.jsonl`.", ""] if report["tasks"] else []
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
            *engine_table(export["engines"]),
            *(f"- Note: {note}." for note in export["notes"]),
            *([""] if export["notes"] else []),
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
    means = [f"- {stage['name']}: {stage['computed_by']}" for stage in report["stages"] if "computed_by" in stage]
    lines += ["", *means] if means else []
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += ["", f"Seed {report['seed']}; {versions}. Figures: `figures/`.", ""]
    lines += made_with(report["provenance"])
    return "\n".join(lines)


def save_report(
    out: Path,
    recipe: Recipe,
    geometry: MLAGeometry,
    metadata: dict[str, dict[str, Any]],
    *,
    answers: dict[str, dict[str, Answers]],
    exported: Path,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Write report.json, report.md, figures/*.png and answers.jsonl below `out`; returns the report.

    Args:
        metadata, answers, exported: as in `collect`. provenance: command, versions, card and commits of the last run.
    """
    report = collect(recipe, geometry, metadata, answers=answers, exported=exported) | {"provenance": provenance}
    save_whole(out / "report.json", json.dumps(report, indent=1))
    save_whole(out / "report.md", render(report))
    plot_figures(report, out / "figures")
    if report["tasks"]:
        save_whole(out / "answers.jsonl", answer_lines(answers))
    else:
        (out / "answers.jsonl").unlink(missing_ok=True)
    return report
