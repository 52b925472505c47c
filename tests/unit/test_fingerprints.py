"""What makes a finished artifact be made again, and what does not."""

import json
from pathlib import Path

import pytest

from transmla.plan.checks import prepare
from transmla.recipe.compose import load_recipe
from transmla.run.fingerprints import Fingerprints

DISTILL = "recover.1.trainer.packing_strategy=wrapped"


def stage(folder: Path, *overrides: str) -> str:
    recipe = load_recipe("debug", ["device=cpu", f"output_dir={folder}", *overrides])
    return Fingerprints(prepare(recipe, exports=False)).stage(1)


def test_what_only_costs_is_no_input(tmp_path) -> None:
    plain = stage(tmp_path, DISTILL)
    assert stage(tmp_path, DISTILL, "recover.1.keep_teacher=true") == plain
    assert stage(tmp_path, DISTILL, "recover.1.keep_teacher=false") == plain
    assert stage(tmp_path, DISTILL, "recover.1.trainer.learning_rate=1") != plain


def test_a_mark_of_synthetic_text_is_an_input(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "b"}))
    found = set()
    for mark in ("", ", synthetic: false", ", synthetic: true"):
        (tmp_path / "a.yaml").write_text(f"{{path: a.jsonl, columns: {{text: text}}{mark}}}")
        found.add(stage(tmp_path, f"recover.1.data=[{tmp_path}/a.yaml]"))
    assert len(found) == 2  # unmarked is what it was before there were marks
    mixed = "recover.1.cross_entropy=0.1"
    assert stage(tmp_path, mixed) != stage(tmp_path, mixed, "recover.1.synthetic_cross_entropy=true")


@pytest.mark.parametrize("change", ["recover.1.trainer.packing_strategy=wrapped", "recover.1.compile=true"])
def test_rows_that_became_others_are_marked(change: str, tmp_path, monkeypatch) -> None:
    """Short rows are joined since, and a compiled epoch has no rest: what was trained without is made again."""
    now = stage(tmp_path, change)
    monkeypatch.setattr("transmla.run.fingerprints._rows", lambda stage: {})
    assert stage(tmp_path, change) != now


def test_other_stages_are_what_they_were(tmp_path, monkeypatch) -> None:
    now = stage(tmp_path)
    monkeypatch.setattr("transmla.run.fingerprints._rows", lambda stage: {})
    assert stage(tmp_path) == now
