"""The report's sections on what models wrote: the data of `write`, and the problems of `evaluate.solve`."""

from __future__ import annotations

from typing import Any

COUNTS = ("problems", "written", "finished", "accepted", "duplicates", "held_out", "kept", "tokens", "sampling_seconds")


def collect_written(metadata: dict[str, Any]) -> dict[str, Any]:
    """The sections' content of report.json. metadata: of all artifacts, by stage."""
    written = {name.removeprefix("write "): own["written"] for name, own in metadata.items() if "written" in own}
    solve = {name.removeprefix("evaluate "): own["solve"] for name, own in metadata.items() if own.get("solve")}
    return {"written": written, "solve": solve}


def written_lines(report: dict[str, Any]) -> list[str]:
    """The sections as lines of report.md; none where nothing was written."""
    return [*_data(report["written"]), *_solved(report["solve"])]


def _data(written: dict[str, dict[str, int]]) -> list[str]:
    if not written:
        return []
    titles = " | ".join(COUNTS).replace("_", " ")
    lines = ["## Written by the teacher", "", f"| data | {titles} |", "|---" * (1 + len(COUNTS)) + "|"]
    for name, counts in written.items():
        cells = [f"{counts[column]:,}" if column in counts else "" for column in COUNTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _solved(solve: dict[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for exam in next(iter(solve.values()), {}):
        lines += [f"## Problems solved: {exam}", ""]
        lines += ["| model | accuracy | 95 % | finished | tokens per reply | seconds |", "|---|---|---|---|---|---|"]
        for model, exams in solve.items():
            one = exams[exam]
            low, high = (100 * end for end in one["interval"])
            lines.append(
                f"| {model} | {100 * one['accuracy']:.1f} % | {low:.1f} to {high:.1f} % | "
                f"{100 * one['finished']:.0f} % | "
                f"{one['tokens']:.0f} | {one['sampling_seconds']} |"
            )
        count = next(iter(solve.values()))[exam]["count"]
        lines += [
            "",
            f"{count:,} problems, the same for every model; a reply that did not end by itself counts as wrong.",
            "",
        ]
        for model, exams in solve.items():
            for shown in exams[exam]["replies"][:1]:
                verdict = "accepted" if shown["accepted"] else "not accepted"
                lines.append(f"- {model} ({verdict}): {' '.join(shown['reply'].split())[:400]}")
        lines.append("")
    return lines
