"""`transmla bench`: the tables, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from transmla.bench.kernel_times import kernel_rows
from transmla.bench.stage_rates import stage_rows
from transmla.files import save_whole
from transmla.plan.checks import Prepared

GIB = 2**30


def bench(prepared: Prepared) -> str:
    """Measure everything; writes bench.json and bench.md into the output directory and returns the latter."""
    card = torch.cuda.get_device_name() if prepared.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    half = prepared.device == "cuda" and prepared.dtype in (torch.bfloat16, torch.float16)
    kernels = list(kernel_rows(prepared.config, prepared.geometry, prepared.dtype)) if half else []
    found: dict[str, Any] = {
        "recipe": prepared.recipe.name,
        "device": card,
        "torch": torch.__version__,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "kernels": kernels,
        "stages": list(stage_rows(prepared)),
    }
    text = render(found)
    prepared.output.mkdir(parents=True, exist_ok=True)
    save_whole(prepared.output / "bench.json", json.dumps(found, indent=1))
    save_whole(prepared.output / "bench.md", text)
    return text


def render(found: dict[str, Any]) -> str:
    """bench.md from the content of bench.json."""
    lines = [f"# Speed of {found['recipe']}", "", f"{found['device']}; torch {found['torch']}; {found['dtype']}", ""]
    if found["kernels"]:
        lines += _table(("kernel", "shape", "ms", "TB/s", "others, ms"), map(_kernel, found["kernels"]))
    else:
        lines += ["Kernels are measured on a GPU, in 16 bits.", ""]
    columns = ("stage", "tokens a second", "first step after", "peak memory", "the plan says", "computed by")
    return "\n".join(lines + _table(columns, map(_stage, found["stages"])))


def _kernel(row: dict[str, Any]) -> tuple[str, ...]:
    others = ", ".join(f"{name} {value:.3g}" for name, value in row["others"].items())
    rate = f"{row['TB/s']:.2f}" if "TB/s" in row else ""
    return row["kernel"], row["shape"], f"{row['ms']:.3g}", rate, others


def _stage(row: dict[str, Any]) -> tuple[str, ...]:
    if "skipped" in row:
        return row["stage"], "", "", "", "", f"not measured: {row['skipped']}"
    return (
        row["stage"],
        f"{row['tokens a second']:,.0f}",
        f"{row['first step after']:.1f} s",
        f"{row['peak memory'] / GIB:.1f} GiB",
        f"{row['planned memory'] / GIB:.1f} GiB",
        row["computed by"],
    )


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [columns, ("---",) * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]
