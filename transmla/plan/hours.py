"""How long the stages of a recipe train, from a rate that is given or that `transmla bench` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transmla.files import read_json
from transmla.recipe.schema import Recipe

BENCH = "bench.json"  # below the output directory


def hours_of(recipe: Recipe, output: Path, processes: int) -> list[str | None]:
    """For a plan, by stage: its hours at the rate of one device, times the devices; None where no rate is known.

    The recipe's `tokens_per_second` goes before what was measured. What several devices lose to one another is not in
    it, nor are conversion, evaluation and checkpoints.
    """
    measured, card = _measured(output)
    found: list[str | None] = []
    for index, stage in enumerate(recipe.recover):
        rate, origin = recipe.tokens_per_second, "as given"
        if rate is None:
            rate, origin = measured.get(f"recover.{index} {stage.kind}"), f"{BENCH} of {card}"
        found.append(
            None
            if not rate
            else f"{_time(stage.tokens / rate / processes)} at {rate:,.0f} tokens/s per device ({origin})"
        )
    return found


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _measured(output: Path) -> tuple[dict[str, float], str]:
    """Tokens a second by stage, and on what; nothing where there is no table that can be read."""
    content: Any = read_json(output / BENCH)
    rows = content.get("stages") if isinstance(content, dict) else None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    rates = {row.get("stage"): row.get("tokens a second") for row in rows}
    return {str(name): rate for name, rate in rates.items() if isinstance(rate, int | float)}, str(
        content.get("device", "an unknown device") if rows else ""
    )
