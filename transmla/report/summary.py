"""What follows from evaluations of several models: differences to the teacher, what was recovered, thresholds."""

from __future__ import annotations

import json
from typing import Any

from transmla.measure.intervals import around, average, mean, paired_difference
from transmla.measure.tasks import Answers
from transmla.recipe.evaluation import AVERAGE, Requirement

ACCURACIES = {"acc": ("correct", "picked"), "acc_norm": ("correct_norm", "picked_norm")}


def figure_lines(metadata: dict[str, Any]) -> list[str]:
    """What one model's evaluation found, a line each, to be read before the other models' are done."""
    lines = [
        f"{data}: KL {quality['kl']:.4f}, perplexity {quality['perplexity']:.3f}, top-1 {100 * quality['top1']:.1f} %"
        for data, quality in metadata.get("quality", {}).items()
    ]
    lines += [
        f"{task}: accuracy {100 * found['acc']:.1f} % of {found['count']:,}"
        for task, found in metadata.get("tasks", {}).items()
    ]
    return lines


def compare_tasks(tasks: dict[str, Any], answers: dict[str, dict[str, Answers]]) -> dict[str, Any]:
    """Summaries by model and task, with differences to the teacher and the mean over the tasks.

    Args:
        tasks: by model, the summaries of its metadata. answers: by model, its answers by task.

    Returns:
        By model and task (and `average`, where there are several): the summary; `difference`, by `acc` and `acc_norm`,
        model − teacher with `value`, `se` and the paired 95 % interval; `agreement`, the share of questions where both
        choose the same. Accuracies are shares of one.
    """
    result: dict[str, Any] = {}
    for model, summaries in tasks.items():
        result[model] = {task: dict(summary) for task, summary in summaries.items()}
        for task, summary in result[model].items():
            ours, theirs = answers[model][task], answers.get("teacher", {}).get(task)
            if model != "teacher" and theirs is not None:
                summary["difference"] = {name: _difference(ours, theirs, name) for name in ACCURACIES}
                summary["agreement"] = {name: _agreement(ours, theirs, name) for name in ACCURACIES}
        if len(summaries) > 1:
            result[model][AVERAGE] = _average(list(result[model].values()))
    return result


def _difference(ours: Answers, theirs: Answers, name: str) -> dict[str, Any] | None:
    own, other = (vars(answers)[ACCURACIES[name][0]] for answers in (ours, theirs))
    if own is None or other is None:
        return None
    value, error = paired_difference(own, other)
    return {"value": value, "se": error, "interval": around(value, error)}


def _agreement(ours: Answers, theirs: Answers, name: str) -> float:
    own, other = (vars(answers)[ACCURACIES[name][1]] for answers in (ours, theirs))
    return mean([float(a == b) for a, b in zip(own, other, strict=True)])


def _average(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain mean over tasks, each task as one; of what every task has."""
    result: dict[str, Any] = {"count": sum(summary["count"] for summary in summaries)}
    compared = all("difference" in summary for summary in summaries)
    if compared:
        result |= {"difference": {}, "agreement": {}}
    for name in ACCURACIES:
        whole = all(summary[name] is not None for summary in summaries)
        value = mean([summary[name] for summary in summaries]) if whole else None
        error = average([summary[f"{name}_se"] or 0.0 for summary in summaries]) if whole else None
        result |= {name: value, f"{name}_se": error}
        result[f"{name}_interval"] = None if value is None or error is None else around(value, error)
        if compared:
            parts = [summary["difference"][name] for summary in summaries]
            result["difference"][name] = None
            if all(part is not None for part in parts):
                value, error = mean([part["value"] for part in parts]), average([part["se"] for part in parts])
                result["difference"][name] = {"value": value, "se": error, "interval": around(value, error)}
            result["agreement"][name] = mean([summary["agreement"][name] for summary in summaries])
    return result


def answer_lines(answers: dict[str, dict[str, Answers]]) -> str:
    """One JSON object a line and question: the right choice and what every model chose."""
    lines = []
    for task, first in next(iter(answers.values()), {}).items():
        for index, gold in enumerate(first.gold):
            row: dict[str, Any] = {"task": task, "question": index, "gold": gold}
            row |= {model: found[task].picked[index] for model, found in answers.items()}
            row |= {f"{model}_norm": found[task].picked_norm[index] for model, found in answers.items()}
            lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def recovered(report: dict[str, Any]) -> list[dict[str, Any]]:
    """In per cent, how much of the teacher's quality a model has, by measure and dataset or task.

    kl: 100·(1 − KL of the model / KL of the converted one). perplexity: 100·teacher / model. acc, acc_norm and solve:
    100·model / teacher. A row is {"measure", "data", "per_cent": {model: value}}; a ratio to nothing is left out.
    """
    rows = []
    quality, tasks, solve = report["quality"], report["tasks"], report.get("solve") or {}
    for dataset in quality.get("teacher", {}):
        base = quality.get("converted", {}).get(dataset, {}).get("kl")
        if base is not None:
            shares = {model: 1 - own[dataset]["kl"] / base if base else None for model, own in _students(quality)}
            rows.append(_row("kl", dataset, shares))
        other = quality["teacher"][dataset]["perplexity"]
        shares = {model: other / own[dataset]["perplexity"] for model, own in _students(quality)}
        rows.append(_row("perplexity", dataset, shares))
    for measure in ACCURACIES:
        for task, summary in tasks.get("teacher", {}).items():
            if other := summary[measure]:
                shares = {model: own[task][measure] / other for model, own in _students(tasks)}
                rows.append(_row(measure, task, shares))
    for name, summary in solve.get("teacher", {}).items():
        if other := summary["accuracy"]:
            shares = {model: own[name]["accuracy"] / other for model, own in _students(solve)}
            rows.append(_row("solve", name, shares))
    return [row for row in rows if row["per_cent"]]


def _students(models: dict[str, Any]) -> list[tuple[str, Any]]:
    """What was found of every model but the teacher, by model."""
    return [(model, own) for model, own in models.items() if model != "teacher"]


def _row(measure: str, data: str, shares: dict[str, float | None]) -> dict[str, Any]:
    per_cent = {model: 100 * value for model, value in shares.items() if value is not None}
    return {"measure": measure, "data": data, "per_cent": per_cent}


def check_thresholds(requirements: list[Requirement], report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every threshold with the value that was measured (None: it was not) and whether it is met."""
    result = []
    for requirement in requirements:
        value = measured(requirement, report)
        found = {"requirement": requirement.describe(), "value": value, "met": requirement.met_by(value)}
        result.append(requirement.model_dump(exclude_none=True) | found)
    return result


def measured(requirement: Requirement, report: dict[str, Any]) -> float | None:
    """The value that a threshold is about, in its unit; None where it was not measured."""
    section = {"accuracy_drop": "tasks", "solve_recovered": "solve"}.get(requirement.measure, "quality")
    models = report.get(section) or {}
    own, other = models.get(requirement.model), models.get("teacher")
    if own is None or other is None:
        return None
    every = [name for name in own if name != AVERAGE]
    names = every if requirement.data == AVERAGE else [requirement.data]
    if not names or any(name not in own or name not in other for name in names):
        return None
    if requirement.measure == "kl":
        return mean([own[name]["kl"] for name in names])
    if requirement.measure == "perplexity_ratio":
        return mean([own[name]["perplexity"] / other[name]["perplexity"] for name in names])
    if requirement.measure == "top1":
        return 100 * mean([own[name]["top1"] for name in names])
    if requirement.measure == "accuracy_drop":
        return 100 * mean([other[name]["acc"] - own[name]["acc"] for name in names])
    teacher = mean([other[name]["accuracy"] for name in names])
    return 100 * mean([own[name]["accuracy"] for name in names]) / teacher if teacher else None


def missed(report: dict[str, Any]) -> list[str]:
    """A line for every threshold that was missed, with the value."""
    lines = []
    for entry in report["required"]:
        if not entry["met"]:
            value = "nothing" if entry["value"] is None else f"{entry['value']:.4g}"
            lines.append(f"threshold missed: {entry['requirement']}, got {value}")
    return lines
