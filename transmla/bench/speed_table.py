"""`transmla bench`: the tables, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from transmla.bench.decoding_rates import decoding_rows
from transmla.bench.kernel_times import kernel_rows
from transmla.bench.stage_rates import random_models, random_tokenizer, stage_rows
from transmla.files import save_whole
from transmla.modeling.determinism import use_deterministic
from transmla.plan.checks import Prepared

GIB = 2**30


def bench(prepared: Prepared) -> str:
    """Measure everything; writes bench.json and bench.md into the output directory and returns the latter."""
    use_deterministic(prepared.recipe.deterministic)
    card = torch.cuda.get_device_name() if prepared.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    half = prepared.device == "cuda" and prepared.dtype in (torch.bfloat16, torch.float16)
    kernels = list(kernel_rows(prepared.config, prepared.geometry, prepared.dtype)) if half else []
    found: dict[str, Any] = {
        "recipe": prepared.recipe.name,
        "device": card,
        "torch": torch.__version__,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "kernels": kernels,
    }
    models, tokenizer = random_models(prepared), random_tokenizer()
    found["stages"] = list(stage_rows(prepared, models, tokenizer))
    named = dict(zip(("source", "student"), models, strict=True))
    found["decoding"] = list(decoding_rows(named | _exported(prepared), tokenizer))
    text = render(found)
    prepared.output.mkdir(parents=True, exist_ok=True)
    save_whole(prepared.output / "bench.json", json.dumps(found, indent=1))
    save_whole(prepared.output / "bench.md", text)
    return text


def _exported(prepared: Prepared) -> dict[str, PreTrainedModel]:
    """A model of random weights of the exported checkpoint's shape, where a recipe is finished."""
    folder = prepared.output / "exported"
    if not (folder / "config.json").is_file():
        return {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device(prepared.device):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=prepared.dtype)
    return {"exported": model.eval()}


def render(found: dict[str, Any]) -> str:
    """bench.md from the content of bench.json."""
    lines = [f"# Speed of {found['recipe']}", "", f"{found['device']}; torch {found['torch']}; {found['dtype']}", ""]
    if found["kernels"]:
        lines += _table(("kernel", "shape", "ms", "TB/s", "GiB", "error", "others, ms"), map(_kernel, found["kernels"]))
    else:
        lines += ["Kernels are measured on a GPU, in 16 bits.", ""]
    columns = ("stage", "tokens a second", "first step after", "peak memory", "the plan says", "computed by")
    lines += _table(columns, map(_stage, found["stages"]))
    names = list(found["decoding"][0]["tokens a second"]) if found["decoding"] else []
    heading = ("rows x prompt", "written", *(f"{name}, tokens a second" for name in names))
    return "\n".join(lines + _table(heading, (_decoding(row, names) for row in found["decoding"])))


def _kernel(row: dict[str, Any]) -> tuple[str, ...]:
    others = ", ".join(f"{name} {value:.3g}" for name, value in row["others"].items())
    rate = f"{row['TB/s']:.2f}" if "TB/s" in row else ""
    memory = f"{row['GiB']:.2f}" if "GiB" in row else ""
    error = f"{row['gradient error']:.2%}" if "gradient error" in row else ""
    return row["kernel"], row["shape"], f"{row['ms']:.3g}", rate, memory, error, others


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


def _decoding(row: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    rates = (row["tokens a second"][name] for name in names)
    return row["shape"], str(row["written"]), *("not measured" if rate is None else f"{rate:,.0f}" for rate in rates)


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [columns, ("---",) * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]
