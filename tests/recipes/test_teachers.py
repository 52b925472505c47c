"""Whole runs whose distillation asks another teacher than the source in memory."""

import json
from pathlib import Path

import pytest

from transmla.cli import main

pytestmark = pytest.mark.usefixtures("quick")

COMMON = ["recipe=debug", "device=cpu", "dtype=float32", "recover.1.tokens=1024"]


def run(out: Path, *overrides: str) -> dict:
    assert main(["recover", *COMMON, f"output_dir={out}", *overrides]) == 0
    return json.loads((out / "report.json").read_text())


def losses(report: dict) -> list[float]:
    log = next(entry["log"] for entry in report["training"] if entry["name"].startswith("recover.1"))
    return [line["loss"] for line in log if "loss" in line]


def test_recorded_whole_or_the_same_model_again_is_the_source(tmp_path, capsys) -> None:
    """All 320 words recorded in float32, or the source as a model of its own: the same losses as with the source."""
    plain = run(tmp_path / "plain")
    recorded = ["recover.1.teacher=recorded", "recover.1.record={top_k: 100000, dtype: float32}"]
    assert main(["recover", *COMMON, f"output_dir={tmp_path}/recorded", *recorded]) == 2
    assert "transmla record" in capsys.readouterr().err
    assert main(["record", *COMMON, f"output_dir={tmp_path}/recorded", *recorded]) == 0
    other = "recover.1.teacher={source: random, config: ${model.config}}"
    for report in (run(tmp_path / "recorded", *recorded), run(tmp_path / "again", other)):
        assert losses(report) == pytest.approx(losses(plain), rel=1e-3)
        assert len(losses(report)) >= 2


def test_a_few_recorded_words_teach_too(tmp_path) -> None:
    recorded = ["recover.1.teacher=recorded", "recover.1.record.top_k=16"]
    assert main(["record", *COMMON, f"output_dir={tmp_path}", *recorded]) == 0
    report = run(tmp_path, *recorded)
    quality = report["quality"]
    assert quality["recovered"]["sample_heldout"]["kl"] < quality["converted"]["sample_heldout"]["kl"]
