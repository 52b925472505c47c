"""A recipe whose teacher writes its data: what comes of it, what is done again, on one process and on two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from transmla.cli import main
from transmla.data.loading import load_one
from transmla.files import save_manifest
from transmla.generate.problems import load_problems, normal
from transmla.generate.prompts import ProblemPrompts
from transmla.generate.sampler import ModelSampler, Sample
from transmla.generate.text_rows import TRACE_COUNTS, trace_rows
from transmla.recipe.compose import load_recipe
from transmla.recipe.writing import Problems, Traces, is_synthetic
from transmla.run.artifacts import read_metadata
from transmla.sources.random_model import make_random_model

ROOT = Path(__file__).resolve().parents[2]
WRITE = """write=[
 {name: own, kind: text, tokens: 500, max_new_tokens: 60, batch_size: 4},
 {name: continued, kind: text, tokens: 250, prefix_data: [sample_train], prefix_tokens: 9, max_new_tokens: 50,
 batch_size: 3}, {name: legs, kind: traces, samples: 2, max_new_tokens: 16, batch_size: 5, keep: all, format: text,
 limit: 6, problems: {generator: leg_counting, size: 20, config: {min_animals: 1, max_animals: 2}, prompt:
 '{problem}'}}, {name: asked, kind: text, tokens: 120, prefix_data: ['@own'], prefix_tokens: 6, cues: [' Why?', ' So'],
 max_new_tokens:
 30, batch_size: 4}]""".replace("\n", "")
SOLVE = """evaluate.solve=[{name: legs, max_new_tokens: 16, batch_size: 3, limit: 7, skip: 6,
 problems: {generator: leg_counting, size: 20, config: {min_animals: 1, max_animals: 2}, prompt:
     '{problem}'}}]""".replace("\n", "")
RECIPE = ["recipe=debug", "device=cpu", WRITE, SOLVE]
USE = [
    "recover.0.data=['@own','@legs']",
    "recover.1.data=['@own']",
    "convert.calibration.data=['@continued']",
    "convert.calibration.tokens=256",
    "recover.0.tokens=3072",
    "evaluate.tokens=512",
]


def rows(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / "written" / name / "data.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "debug"
    assert main(["recover", *RECIPE, *USE, f"output_dir={out}"]) == 0
    return out


def test_a_whole_recipe(written: Path, capsys) -> None:
    report = json.loads((written / "report.json").read_text())
    took = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    drawn = {f"write {name}": one["sampling_seconds"] for name, one in report["written"].items()}
    drawn |= {f"evaluate {name}": exams["legs"]["sampling_seconds"] for name, exams in report["solve"].items()}
    assert len(drawn) == 8 and all(seconds > 0 and took[name] >= seconds - 0.1 for name, seconds in drawn.items())
    assert report["written"]["own"]["tokens"] >= 500 > report["written"]["own"]["tokens"] - 4 * 61
    seconds = report["written"]["legs"].pop("sampling_seconds")
    assert seconds > 0 and report["written"]["legs"] | {"finished": 0, "tokens": 0} == {
        "problems": 6,
        "written": 12,
        "finished": 0,
        "accepted": 0,
        "duplicates": 0,
        "held_out": 0,
        "kept": 12,
        "tokens": 0,
    }
    assert (
        report["quality"]["recovered"]["sample_heldout"]["kl"] < report["quality"]["converted"]["sample_heldout"]["kl"]
    )
    assert list(report["solve"]) == ["teacher", "converted", "recovered", "exported"]
    assert report["solve"]["teacher"]["legs"]["count"] == 7
    # greedy: the export is the recovered student in other words, and not the converted one
    replies = {name: [shown["reply"] for shown in exams["legs"]["replies"]] for name, exams in report["solve"].items()}
    assert replies["exported"] == replies["recovered"] != replies["converted"]
    text = (written / "report.md").read_text()
    assert "## Written by the teacher" in text and "## Problems solved: legs" in text
    assert main(["recover", *RECIPE, *USE, f"output_dir={written}"]) == 0
    assert "..." not in [line[-3:] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]


def test_what_is_written(written: Path) -> None:
    for row in rows(written, "own"):
        assert row["tokens"][0] == 0 and 0 not in row["tokens"][1:]  # the end token, which starts a text here
        assert len(row["tokens"]) <= 61 and (row["finished"] or len(row["tokens"]) == 61)
    texts = [text.encode() for text in load_one("sample_train", "k")["text"]]
    # a token is a byte here, and a prefix may end within a character
    found = [row["text"].split("\ufffd")[0].encode()[:9] for row in rows(written, "continued")]
    assert all(any(start in text for text in texts) for start in found) and len(set(found)) > 3
    assert not any(text.startswith(start) for start in found for text in texts)  # nor from the beginning
    starts = {row["text"].encode()[:6].decode(errors="replace") for row in rows(written, "own")}
    asked = [row["text"] for row in rows(written, "asked")]
    assert (
        all(any(text.startswith((start + " Why?", start + " So")) for start in starts) for text in asked)
        and len(set(asked)) > 3
    )
    # A cross-entropy leaves out what nobody chose: of these replies, too, all were kept.
    marks = {
        name: load_one(str(written / "written" / name / "data.yaml"), "k") for name in ("own", "continued", "legs")
    }
    assert all(all(data["synthetic"]) for data in marks.values())
    assert [row["problem"] for row in rows(written, "legs")] == [number for number in range(6) for _ in range(2)]


def test_nothing_is_used_before_it_is_written(tmp_path, capsys) -> None:
    assert main(["convert", *RECIPE, *USE, f"output_dir={tmp_path}/out"]) == 2
    assert "convert.calibration.data: @continued is not written" in capsys.readouterr().err


def test_dry_run(tmp_path, capsys) -> None:
    assert main(["traces", *RECIPE, *USE, f"output_dir={tmp_path}/out", "dry_run=true"]) == 0
    assert "@legs: 2 replies to each of 6 problems of reasoning-gym leg_counting" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_another_choice_costs_no_generation(written: Path, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "debug"
    shutil.copytree(written / "written", out / "written")
    monkeypatch.setattr(ModelSampler, "__call__", lambda *args: pytest.fail("something was drawn"))
    words = ["traces", *RECIPE, f"output_dir={out}"]
    assert main([*words, "write.2.format=messages"]) == 2  # the debug model's tokenizer has no chat template
    words.append("write.2.format=completion")
    assert main(words) == 0
    assert set(rows(out, "legs")[0]) == {"prompt", "completion", "problem", "accepted", "finished"}
    assert "none is left" not in capsys.readouterr().err
    assert main([*words, "write.2.keep=accepted"]) == 2
    assert "none is left" in capsys.readouterr().err
    assert "completion" in rows(out, "legs")[0]  # what was there stays


def test_interrupted_writing_goes_on(written: Path, tmp_path, monkeypatch) -> None:
    original, calls = ModelSampler.__call__, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    out = tmp_path / "debug"
    monkeypatch.setattr(ModelSampler, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        main(["traces", *RECIPE, f"output_dir={out}"])
    assert not (out / "written" / "own").exists()
    assert main(["traces", *RECIPE, f"output_dir={out}"]) == 0
    for name in ("own", "continued", "legs", "asked"):
        assert (out / "written" / name / "data.jsonl").read_bytes() == (
            written / "written" / name / "data.jsonl"
        ).read_bytes()
    drawn = sum(len(file.read_text().splitlines()) for file in (written / "written").glob("*.parts/*.jsonl"))
    assert len(calls) == drawn + 1  # the batch that died is all that was drawn twice


def test_what_follows_another_text_is_drawn_again_with_it(written: Path, tmp_path, monkeypatch) -> None:
    """The same settings may have given another text, on another machine; its continuations are not this one's."""
    original, calls = ModelSampler.__call__, []
    monkeypatch.setattr(ModelSampler, "__call__", lambda self, *args: (calls.append(1), original(self, *args))[1])
    for redrawn in (False, True):
        out = tmp_path / str(redrawn)
        shutil.copytree(written / "written", out / "written")
        shutil.rmtree(out / "written" / "asked")
        if redrawn:
            file = out / "written" / "own" / "data.jsonl"
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
            save_manifest(file.parent)  # as if it had been written so
        assert main(["traces", *RECIPE, f"output_dir={out}"]) == 0
        assert bool(calls) == redrawn
        assert (rows(out, "asked") == rows(written, "asked")) != redrawn


def test_two_processes_write_what_one_writes(written: Path, tmp_path) -> None:
    script = tmp_path / "both.py"
    script.write_text(
        "import sys\n"
        "from transmla.plan.checks import prepare\n"
        "from transmla.recipe.compose import load_recipe\n"
        "from transmla.run.context import Run\n"
        "from transmla.run.evaluate import evaluate\n"
        "from transmla.run.write import write\n"
        "run = Run(prepare(load_recipe('debug', sys.argv[1:]), exports=False))\n"
        "write(run)\n"
        "evaluate(run)\n"
        "run.state.destroy_process_group()\n"
    )
    out = tmp_path / "two"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
            str(script),
            *RECIPE[1:],
            f"output_dir={out}",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("own", "continued", "legs"):
        assert rows(out, name) == rows(written, name)
        assert len(list((out / "written" / f"{name}.parts").glob("*.jsonl"))) == 2
    two, one = (read_metadata(folder / "evaluation" / "teacher") for folder in (out, written))
    assert one is not None and two is not None
    assert one["solve"]["legs"] | {"sampling_seconds": 0} == two["solve"]["legs"] | {"sampling_seconds": 0}


def test_traces_are_checked_and_told_apart(tmp_path) -> None:
    """Accepted are right answers of replies that ended; the same reply twice, in another case, is one."""
    make_random_model(load_recipe("debug").model, tmp_path / "model")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    problems = Problems(generator="leg_counting", size=3, config={"min_animals": 1, "max_animals": 2})
    found = load_problems(problems, "k")
    entry = Traces(name="x", kind="traces", problems=problems, samples=3)
    asked = ProblemPrompts(found, problems, tokenizer, samples=3, batch_size=2)

    def replies(number: int) -> list[Sample]:
        right = found.problems[number].entry["answer"]
        texts = [
            f"So <answer>{right}</answer>",
            f"so  <ANSWER>9999</ANSWER> <answer>{right}</answer>",
            "<answer>9999</answer>",
        ]
        texts[1] = f"so  <answer>{right}</answer>" if number == 0 else texts[1]
        return [Sample(tokenizer(text)["input_ids"], True) for text in texts]

    samples = [sample for number in range(3) for sample in replies(number)]
    samples[3] = Sample(samples[3].tokens, finished=False)  # right, but it did not end
    heldout = {normal(found.problems[2].question)}
    counts = dict.fromkeys(TRACE_COUNTS, 0)
    kept = list(trace_rows(asked, samples, entry, heldout, counts))
    assert counts | {"tokens": 0} == {
        "problems": 3,
        "written": 9,
        "finished": 8,
        "accepted": 5,
        "duplicates": 1,
        "held_out": 2,
        "kept": 2,
        "tokens": 0,
    }
    assert not is_synthetic(entry) and not is_synthetic(entry.model_copy(update={"format": "text"}))
    assert is_synthetic(entry.model_copy(update={"format": "text", "keep": "finished"}))
    assert [row["completion"] for row in kept] == [
        tokenizer.decode(samples[0].tokens),
        tokenizer.decode(samples[4].tokens),
    ]
    assert [row["prompt"] for row in kept] == asked.texts[:2]
