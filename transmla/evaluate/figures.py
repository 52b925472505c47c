"""Error bars, and tasks.png: accuracy of every model on every task, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEASURES = {"acc": "accuracy", "acc_norm": "length-normalised accuracy"}


def error_bars(values: list[float], bounds: list[Sequence[float]]) -> list[list[float]]:
    """Lengths below and above each value, as matplotlib takes them. bounds: (low, high) of each."""
    pairs = list(zip(values, bounds, strict=True))
    return [[value - low for value, (low, _) in pairs], [high - value for value, (_, high) in pairs]]


def draw_tasks(tasks: dict[str, Any], folder: Path) -> None:
    """A group of bars a task and a panel a measure; nothing where no tasks were evaluated. tasks: the report's."""
    if not tasks:
        return
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    first = next(iter(tasks.values()))
    figure = Figure(figsize=(max(6.0, 1.6 * len(first)), 6.4), layout="constrained")
    width = 0.8 / len(tasks)
    for axes, (measure, title) in zip(figure.subplots(2, 1), MEASURES.items(), strict=True):
        names = [task for task, summary in first.items() if summary[measure] is not None]
        for number, (model, summaries) in enumerate(tasks.items()):
            where = [place + (number - (len(tasks) - 1) / 2) * width for place in range(len(names))]
            values = [100 * summaries[task][measure] for task in names]
            bounds = [[100 * bound for bound in summaries[task][f"{measure}_interval"]] for task in names]
            axes.bar(where, values, width, yerr=error_bars(values, bounds), capsize=2, label=model)
        axes.set(title=title, ylabel="per cent", ylim=(0, 100), xticks=range(len(names)), xticklabels=names)
        if names:
            axes.legend(fontsize="small", ncols=len(tasks))
    figure.savefig(folder / "tasks.png", dpi=120)
