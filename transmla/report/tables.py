"""Tables of report.md: quality with intervals, tasks beside the teacher's, what was recovered, thresholds."""

from __future__ import annotations

from typing import Any

TITLES = {"acc": "accuracy", "acc_norm": "length-normalised accuracy"}

RECOVERED = {
    "kl": "KL",
    "perplexity": "perplexity",
    "acc": "accuracy",
    "acc_norm": "length-normalised accuracy",
    "solve": "problems solved",
}

DEFINITIONS = {
    "kl": "KL: 100 · (1 − KL of the model / KL of the converted one), how much of the conversion's loss is gone.",
    "perplexity": "Perplexity: 100 · teacher's / model's.",
    "acc": "Accuracies: 100 · model's / teacher's; guessing is not deducted.",
    "solve": "Problems solved: 100 · model's share / teacher's.",
}


def ranks_table(geometry: dict[str, Any]) -> list[str]:
    """What a rank of tensor parallelism caches; nothing for conversions of before there were such figures."""
    rows = geometry.get("cached_values_by_ranks", [])[1:]
    if not rows:
        return []
    columns = ["ranks of tensor parallelism", "source", "student in stock engines"]
    latents = geometry["latent_heads"] > 1
    lines = ["Cached values per token and layer on each rank:", "", _head(*columns, *(["latents split"] * latents))]
    keys = ["ranks", "source", "stock", *(["split"] * latents)]
    return [*lines, *(_cells(*(str(row[key]) for key in keys)) for row in rows), ""]


def quality_table(report: dict[str, Any], dataset: str) -> list[str]:
    """Perplexity, KL and agreement of every model on one dataset."""
    title, columns = f"## Quality on {dataset}", "| model | perplexity | KL to teacher | top-1 agreement |"
    lines = [title, "", columns, "|---|---|---|---|"]
    first = next(iter(report["quality"].values()))[dataset]
    for name, models in report["quality"].items():
        q = models[dataset]
        perplexity, kl = f"{q['perplexity']:.3f}", f"{q['kl']:.4f}"
        if q["perplexity_interval"] is not None:
            perplexity += " ({:.3f} to {:.3f})".format(*q["perplexity_interval"])
            kl += " ({:.4f} to {:.4f})".format(*q["kl_interval"]) if name != "teacher" else ""
        lines.append(f"| {name} | {perplexity} | {kl} | {100 * q['top1']:.1f} % |")
    text = f"{first['tokens']:,} predicted tokens, the same {first['windows']:,} windows for every model"
    if first["perplexity_interval"] is not None:
        text += "; in brackets 95 % intervals over the windows. KL is KL(teacher ‖ model), nats per token"
    return [*lines, "", f"{text}.", ""]


def task_tables(tasks: dict[str, Any]) -> list[str]:
    """By accuracy and length-normalised accuracy: every task with the teacher beside the others, and the
    differences."""
    if not tasks:
        return []
    first = next(iter(tasks.values()))
    students = [model for model in tasks if model != "teacher"]
    lines = ["## Questions with choices", ""]
    for measure, title in TITLES.items():
        names = [task for task, summary in first.items() if summary[measure] is not None]
        if not names:
            continue
        lines += [f"### {title.capitalize()}, per cent", "", _head("task", "questions", *tasks)]
        for task in names:
            cells = [_share(models[task], measure) for models in tasks.values()]
            lines.append(_cells(task, f"{first[task]['count']:,}", *cells))
        lines.append("")
        if "teacher" in tasks and students:
            lines += [f"### {title.capitalize()}, difference to the teacher in points", "", _head("task", *students)]
            for task in names:
                lines.append(_cells(task, *(_difference(tasks[model][task], measure) for model in students)))
            lines.append("")
    if "teacher" in tasks and students:
        lines += ["### Questions with the teacher's likeliest choice, per cent", "", _head("task", *students)]
        for task in first:
            shares = (tasks[model][task]["agreement"]["acc"] for model in students)
            lines.append(_cells(task, *(f"{100 * share:.1f}" for share in shares)))
        lines.append("")
    return [
        *lines,
        "In brackets 95 % intervals. Those of the differences are paired: both models answered the same questions, and "
        "only questions on which they differ count. A difference whose interval holds 0 may be chance. "
        "Length-normalised: the choice with the highest log-likelihood a character. The average takes every task as "
        "one.",
        "",
    ]


def recovered_table(rows: list[dict[str, Any]]) -> list[str]:
    """What each model has of the teacher's quality, in per cent, and what that means."""
    if not rows:
        return []
    models = list(dict.fromkeys(model for row in rows for model in row["per_cent"]))
    lines = ["## Recovered, per cent", "", _head("measure", "on", *models)]
    for row in rows:
        cells = (f"{row['per_cent'][model]:.1f}" if model in row["per_cent"] else "" for model in models)
        lines.append(_cells(RECOVERED[row["measure"]], row["data"], *cells))
    shown = {"acc" if row["measure"] == "acc_norm" else row["measure"] for row in rows}
    return [*lines, "", *(f"- {text}" for measure, text in DEFINITIONS.items() if measure in shown), ""]


def threshold_table(required: list[dict[str, Any]]) -> list[str]:
    """The recipe's thresholds, met or missed."""
    if not required:
        return []
    lines = ["## Thresholds", "", _head("threshold", "measured", "")]
    for entry in required:
        value = "nothing" if entry["value"] is None else f"{entry['value']:.4g}"
        lines.append(_cells(entry["requirement"], value, "met" if entry["met"] else "**missed**"))
    return [*lines, ""]


def engine_table(engines: dict[str, Any]) -> list[str]:
    """Which serving engine reads the checkpoint rightly, and how that is known."""
    if not engines:
        return []
    lines = [_head("engine", "reads it", "version")]
    for engine, found in engines.items():
        lines.append(_cells(engine, "yes" if found["reads"] else "**no**", found["checked"]))
    return [*lines, ""]


def _head(*titles: str) -> str:
    return f"{_cells(*titles)}\n|{'---|' * len(titles)}"


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _share(summary: dict[str, Any], measure: str) -> str:
    low, high = summary[f"{measure}_interval"]
    return f"{100 * summary[measure]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _difference(summary: dict[str, Any], measure: str) -> str:
    difference = summary["difference"][measure]
    low, high = difference["interval"]
    return f"{100 * difference['value']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def made_with(provenance: dict[str, Any]) -> list[str]:
    """The command, the machine, and the commits of hub repositories."""
    lines = [f"Last command: `{provenance['command']}`; Python {provenance['python']}, {provenance['device']}.", ""]
    if provenance["deterministic"] is not None:
        lines += ["Deterministic: the same command gives the same bits on such a device.", ""]
        lines += [*(f"- {line}" for line in provenance["deterministic"]), ""]
    lines += [
        f"- {key} is {entry['repository']}, commit {entry['commit'] or 'unknown'}"
        for key, entry in provenance["hub"].items()
    ]
    return lines + [""] if provenance["hub"] else lines
