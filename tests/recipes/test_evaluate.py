"""Questions and thresholds in a whole run: what the report holds, the exit code, what is made again."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import all_metadata
from transmla.cli import main

WORDS = ["a cat", "dogs", "the sea", "ten", "a house on the hill"]


def questions(file: Path, *, shift: int = 0) -> Path:
    rows = [
        {
            "ctx": f"Question: which of {number}?\nAnswer:",
            "choices": [f" {word}" for word in WORDS[number % 3 :]],
            "gold": (number + shift) % 2,
        }
        for number in range(12)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a run without recovery, and its folder, whose thresholds are met."""
    folder = tmp_path_factory.mktemp("questions")
    first, other = questions(folder / "first.jsonl"), questions(folder / "other.jsonl", shift=1)
    tasks = f"evaluate.tasks=[{first},{{path: {other}, name: second, limit: 9}}]"
    words = ["recipe=debug", "device=cpu", "recover=[]", f"output_dir={folder}/out", tasks]
    assert main(["recover", *words, require("accuracy_drop", "average", 100.0)]) == 0
    return words, folder / "out"


def require(measure: str, data: str, bound: float) -> str:
    return f"evaluate.require=[{{measure: {measure}, data: {data}, model: exported, at_most: {bound}}}]"


def test_the_report_has_the_questions(finished: tuple[list[str], Path]) -> None:
    _, out = finished
    report = json.loads((out / "report.json").read_text())
    assert list(report["tasks"]) == ["teacher", "converted", "exported"]
    assert [summary["count"] for summary in report["tasks"]["exported"].values()] == [12, 9, 21]
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 21 and {"task", "question", "gold", "teacher", "converted", "exported"} <= set(lines[0])
    for model in report["tasks"]:
        right = [line["gold"] == line[model] for line in lines if line["task"] == "second"]
        assert report["tasks"][model]["second"]["acc"] == pytest.approx(sum(right) / 9)
    first = report["tasks"]["exported"]["first"]
    assert first["difference"]["acc"]["value"] == pytest.approx(
        first["acc"] - report["tasks"]["teacher"]["first"]["acc"]
    )
    # the exported model is the student without rounding, in other classes
    assert [line["converted"] for line in lines] == [line["exported"] for line in lines]
    rows = {(row["measure"], row["data"]): row["per_cent"] for row in report["recovered"]}
    assert rows["kl", "sample_heldout"]["converted"] == 0
    assert [entry["met"] for entry in report["required"]] == [True]
    text = (out / "report.md").read_text()
    assert "| second | 9 |" in text and "at most 100 |" in text and "| met |" in text
    assert (out / "figures" / "tasks.png").stat().st_size > 5000


def test_a_missed_threshold_is_exit_code_1_after_the_report(finished: tuple[list[str], Path], capsys) -> None:
    words, out = finished
    before = all_metadata(out)
    capsys.readouterr()
    assert main(["evaluate", *words, require("kl", "sample_heldout", 0.0001)]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    kl = json.loads((out / "report.json").read_text())["quality"]["exported"]["sample_heldout"]["kl"]
    assert line == f"threshold missed: kl of exported on sample_heldout at most 0.0001, got {kl:.4g}"
    assert "**missed**" in (out / "report.md").read_text()
    assert all_metadata(out) == before  # a threshold is no reason to evaluate again
    assert main(["evaluate", *words, require("kl", "sample_heldout", 50.0)]) == 0


def test_other_questions_are_asked_again(finished: tuple[list[str], Path], capsys) -> None:
    words, out = finished
    file = out.parent / "first.jsonl"
    old, times = file.read_bytes(), file.stat()
    capsys.readouterr()

    def asked(*more: str) -> list[str]:
        assert main(["evaluate", *words, *more]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("[") and line.endswith("...")]

    file.touch()  # the content is what counts
    assert asked() == []
    file.write_bytes(old.replace(b'"gold": 1', b'"gold": 0'))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(asked()) == 3
    assert len(asked("evaluate.tasks.1.limit=8")) == 3
    assert asked("evaluate.tasks=[]") and not (out / "answers.jsonl").exists()


@pytest.mark.parametrize(
    "words,message",
    [
        (["evaluate.tasks=[nowhere/q.jsonl]"], "evaluate.tasks.0: no such file"),
        (["evaluate.tasks=[{path: q.jsonl, limits: 3}]"], "evaluate.tasks.0.limits: unknown key"),
        (["evaluate.tasks=[{limit: 3}]"], "evaluate.tasks.0: give exactly one of task"),
        ([require("accuracy_drop", "x", 1.0)], "evaluate.require.0.measure: accuracy_drop needs evaluate.tasks"),
        (["evaluate.require=[{measure: kl, data: sample_heldout}]"], "evaluate.require.0: give exactly one of at_most"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    words: list[str], message: str, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("transmla.run.context.Run.__init__", lambda *args: pytest.fail("it ran"))
    assert main(["recover", "recipe=debug", f"output_dir={tmp_path}", "dry_run=true", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_plan_names_questions_and_thresholds(tmp_path, capsys) -> None:
    file = questions(tmp_path / "q.jsonl")
    words = [f"evaluate.tasks=[{file}]", require("accuracy_drop", "q", 2.0)]
    assert main(["recover", "recipe=debug", f"output_dir={tmp_path}/out", "dry_run=true", *words]) == 0
    printed = capsys.readouterr().out
    assert "questions of q" in printed and "accuracy_drop of exported on q at most 2" in printed
