"""What report.json says of how a run can be repeated."""

import sys

import pytest

from transmla.recipe.compose import load_recipe
from transmla.report.tables import made_with
from transmla.run import provenance as module
from transmla.run.provenance import hub_sources, provenance


@pytest.fixture(autouse=True)
def commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "commit_of", lambda repository, revision, kind: f"{kind} {repository} {revision}")


def test_every_hub_source_is_named_with_its_commit() -> None:
    teacher = "recover.1.teacher={source: Qwen/Qwen2.5-14B-Instruct, revision: abc}"
    found = hub_sources(load_recipe("qwen7b_r1", [f"+{teacher}"]))
    assert found["model.source"]["commit"] == "model Qwen/Qwen2.5-7B-Instruct None"
    assert found["recover.1.teacher"] == {
        "repository": "Qwen/Qwen2.5-14B-Instruct",
        "revision": "abc",
        "commit": "model Qwen/Qwen2.5-14B-Instruct abc",
    }
    traces = "dataset open-r1/OpenR1-Math-220k None"
    assert found["convert.calibration.data: openr1_math"]["commit"] == traces
    assert found["recover.0.data: openr1_math"]["commit"] == traces
    assert any(key.startswith("evaluate.solve.0: math_500") for key in found)
    assert not any("sample_heldout" in key for key in found)


def test_written_text_and_prefixes() -> None:
    found = hub_sources(load_recipe("smollm2_135m_gpu", []))
    assert "write.0: general_text" in found and not any("@" in key for key in found)


def test_the_command_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "a" * 34
    monkeypatch.setattr(sys, "argv", ["recover.py", "recipe=debug", f"name={token}", "output_dir=a b"])
    found = provenance(load_recipe("debug", []), "cpu")
    assert found["command"] == "recover.py recipe=debug 'name=***' 'output_dir=a b'" and found["hub"] == {}
    assert found["packages"]["torch"] and found["device"].startswith("CPU")
    assert made_with(found)[0].startswith("Last command: `recover.py recipe=debug")
