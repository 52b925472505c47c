"""The figures of a report, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transmla.recipe.local_paths import paths_in, short_names, shortened_tree

MEASURES = {"acc": "accuracy", "acc_norm": "length-normalised accuracy"}


def error_bars(values: list[float], bounds: Sequence[Sequence[float]]) -> list[list[float]]:
    """Lengths below and above each value, as matplotlib takes them. bounds: (low, high) of each."""
    pairs = list(zip(values, bounds, strict=True))
    return [[value - low for value, (low, _) in pairs], [high - value for value, (_, high) in pairs]]


def plot_tasks(tasks: dict[str, Any], folder: Path) -> None:
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


def plot_figures(report: dict[str, Any], folder: Path) -> None:
    """loss.png, quality.png, tasks.png, layers.png; a figure without data is not drawn.

    Files of this machine are named without their folder: the figures are published with the model.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    report = shortened_tree(report, short_names(paths_in(report)))
    folder.mkdir(parents=True, exist_ok=True)
    curves = [(entry["name"], [line for line in entry["log"] if "loss" in line]) for entry in report["training"]]
    curves = [(name, lines) for name, lines in curves if lines]
    if curves:
        figure = Figure(figsize=(5 * len(curves), 3.4), layout="constrained")
        for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
            loss = "normalised attention error" if "layerwise" in name else "loss, nats per token"
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
                bounds = [
                    quality[name][dataset][f"{key}_interval"] or (quality[name][dataset][key],) * 2 for name in names
                ]
                bars = axes.bar(names, values, yerr=error_bars(values, bounds), capsize=3, color="tab:blue", width=0.6)
                axes.bar_label(bars, fmt="%.3g")
                axes.set(title=dataset, ylabel={"kl": "KL to teacher, nats per token"}.get(key, key))
                axes.margins(y=0.15)
        figure.savefig(folder / "quality.png", dpi=120)
    plot_tasks(report["tasks"], folder)
    if report["layer_errors"]:
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, errors in report["layer_errors"].items():
            axes.plot(range(len(errors)), errors, marker="o", markersize=3, label=name)
        axes.set(
            xlabel="layer", ylabel="normalised attention error", ylim=(0, None), title="error by layer, held-out window"
        )
        axes.legend()
        figure.savefig(folder / "layers.png", dpi=120)
