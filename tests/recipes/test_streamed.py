"""A whole recipe with models read layer by layer gives what the whole models give."""

import json
from pathlib import Path

import pytest

from tests.conftest import all_metadata, quickly
from tests.recipes.test_evaluate import questions, require
from transmla.cli import main

COMMAND = ["recipe=debug", "device=cpu", "recover=[]", "evaluate.batch_size=3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a run with whole models and of one that is streamed."""
    found = {}
    for way in ("false", "true"):
        out = tmp_path_factory.mktemp("runs") / way
        more = [f"output_dir={out}", f"convert.streaming={way}", f"evaluate.streaming={way}"]
        with quickly():
            assert main(["recover", *COMMAND, *more]) == 0
        found[way] = out
    return found


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_the_same_figures(finished: dict[str, Path]) -> None:
    whole, streamed = report(finished["false"]), report(finished["true"])
    assert list(streamed["quality"]) == ["teacher", "converted", "exported"]
    for model, quality in whole["quality"].items():
        for name, value in quality["sample_heldout"].items():
            assert streamed["quality"][model]["sample_heldout"][name] == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert streamed["layer_errors"]["converted"] == pytest.approx(whole["layer_errors"]["converted"], rel=1e-5)


def test_what_is_left_out_is_said(finished: dict[str, Path]) -> None:
    whole, streamed = report(finished["false"]), report(finished["true"])
    assert whole["continuations"] and not whole["left_out"]
    assert not streamed["continuations"] and streamed["left_out"] == ["evaluate.prompts"]
    text = (finished["true"] / "report.md").read_text()
    assert "Not measured, because models were read layer by layer: evaluate.prompts." in text
    kept = all_metadata(finished["true"])["evaluation/converted"]
    assert kept["left_out"] == ["evaluate.prompts"] and "continuations" not in kept


def test_what_was_left_out_is_made_up_for(finished: dict[str, Path], capsys) -> None:
    """The same settings on a machine that holds the models measure it; students stay as they are."""
    out = finished["true"]
    capsys.readouterr()
    with quickly():
        assert main(["recover", *COMMAND, f"output_dir={out}", "evaluate.streaming=false"]) == 0
    assert "[convert] unchanged, skipped" in capsys.readouterr().out
    assert report(out)["continuations"] and not report(out)["left_out"]


def test_a_threshold_on_what_is_left_out(tmp_path: Path, capsys) -> None:
    tasks = f"evaluate.tasks=[{questions(tmp_path / 'some.jsonl')}]"
    words = [*COMMAND, f"output_dir={tmp_path}/out", "evaluate.streaming=true", tasks]
    assert main(["recover", *words, require("accuracy_drop", "some", 100.0)]) == 2
    assert "evaluate.require.0.measure: accuracy_drop is not measured" in capsys.readouterr().err
    assert not (tmp_path / "out" / "converted").exists()


def test_a_check_that_has_no_memory_for_the_model(finished: dict[str, Path], capsys, monkeypatch) -> None:
    """In a fresh process, whose modules read their weights when they are called; the same scores, to rounding."""
    out = finished["false"]
    monkeypatch.setattr("transmla.run.export.memory_of_check", lambda *args, by_module: 0 if by_module else 2**60)
    capsys.readouterr()
    assert main(["verify", *COMMAND, f"output_dir={out}"]) == 0
    printed = capsys.readouterr().out
    assert "[export] weights are read when they are needed" in printed
    difference = float(printed.rsplit("log-probabilities| ", 1)[1])
    assert difference == pytest.approx(report(out)["export"]["max_abs_logprob_diff"], rel=0.5)
    monkeypatch.setattr("transmla.run.export.memory_of_check", lambda *args, by_module: 2**60)
    assert main(["verify", *COMMAND, f"output_dir={out}"]) == 2
    assert "even where weights are read when they are needed" in " ".join(capsys.readouterr().err.split())
