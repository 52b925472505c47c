"""`transmla zoo`: convert a list of recipes, measure each, and write one table."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from transmla.errors import RecipeError
from transmla.files import save_whole
from transmla.plan.checks import Prepared, prepare
from transmla.plan.dry_run import render_plan
from transmla.process.output_lock import only_run
from transmla.recipe.compose import load_recipe
from transmla.recipe.names import ZOO, recipe_names
from transmla.run.comparison import compare
from transmla.run.context import Run

ROOT = "outputs/zoo"

COLUMNS = [
    "recipe",
    "latent + rope",
    "cache",
    "original",
    "partial RoPE",
    "MLA",
    "KL",
    "top-1",
    "seconds",
    "peak GiB",
    "text",
]


def run_zoo(recipes: Iterable[str], overrides: list[str]) -> int:
    """Convert every recipe, print and write the table (`zoo.md`, `zoo.json`).

    A recipe that fails is a row with its reason; a row that is done is not made again.

    Args:
        recipes: names; empty for all of `recipes/zoo`.
        overrides: for every recipe; `output_dir=DIR` is the folder of the whole table.

    Returns:
        0, or 1 where a recipe failed.

    Raises:
        RecipeError: a recipe or an override is wrong, before any is run.
    """
    names = list(recipes) or [name for name in recipe_names() if name.startswith(f"{ZOO}/")]
    root = Path(
        next((word.partition("=")[2] for word in overrides if word.startswith("output_dir=")), ROOT)
    ).expanduser()
    words = [word for word in overrides if not word.startswith("output_dir=")]
    loaded = [load_recipe(name, [*words, f"output_dir={root}/{{name}}"]) for name in names]
    for index, recipe in enumerate(loaded):
        if any(recipe.name == other.name for other in loaded[:index]):
            raise RecipeError(
                "recipe", f"two recipes are called {recipe.name}; their results would overwrite each other"
            )
    rows: list[dict[str, Any]] = []
    for recipe in loaded:
        row: dict[str, Any] = {"recipe": recipe.name, "source": recipe.model.source}
        try:
            prepared = prepare(recipe, exports=False)
            if recipe.dry_run:
                print(render_plan(prepared), end="\n\n")
                continue
            row |= _row(prepared)
        except RecipeError as error:
            row["failed"] = str(error)
        except (
            Exception
        ) as error:  # one model that does not load or fit must not end a night's run; the reason is shown
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows.append(row)
        if "failed" in row:
            print(f"{recipe.name}: {row['failed']}", file=sys.stderr, flush=True)
        save_whole(root / "zoo.json", json.dumps(rows, indent=1))
        save_whole(root / "zoo.md", render(rows))
        _free()
    if rows:
        print(render(rows))
    return int(any("failed" in row for row in rows))


def _row(prepared: Prepared) -> dict[str, Any]:
    with only_run(prepared.output):
        metadata = compare(Run(prepared))
    kept = ("seconds", "tokens", "peak_memory_bytes", "dataset", "versions")
    return metadata["conversion"] | {name: metadata[name] for name in kept}


def _free() -> None:
    """Give a finished model's memory back before the next one loads."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def render(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown; a failed recipe has its reason in its row."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    failed = [row for row in rows if "failed" in row]
    for row in rows:
        if row in failed:
            lines.append(f"| {row['recipe']} | failed: {row['failed'].replace('|', '/')} |" + " |" * (len(COLUMNS) - 2))
            continue
        quality = row["quality"]
        cells = [
            row["recipe"],
            f"{row['kv_lora_rank']} + {row['qk_rope_head_dim']}",
            f"-{row['saving_percent']} %",
            *(f"{quality[name]['perplexity']:.4f}" for name in ("original", "partial_rope", "mla")),
            f"{quality['mla']['kl']:.4f}",
            f"{100 * quality['mla']['top1']:.1f} %",
            f"{row['seconds']}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
            row["dataset"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Perplexity of the three models on the same windows; KL (nats per token) and top-1 agreement of the MLA "
        "model with "
        "the original, before any recovery. On a CPU the peak is that of the process so far.",
        "",
    ]
    return "\n".join(lines)
