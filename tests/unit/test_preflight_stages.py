"""Stages that are refused before any weight loads."""

import pytest

from transmla.errors import RecipeError
from transmla.plan.checks import prepare
from transmla.recipe.compose import load_recipe


def refused(overrides: list[str]) -> str:
    with pytest.raises(RecipeError) as error:
        prepare(load_recipe("debug", ["device=cpu", *overrides]))
    return str(error.value)


def test_a_compiled_stage_needs_a_compiler(monkeypatch) -> None:
    prepare(load_recipe("debug", ["device=cpu", "recover.1.compile=true"]))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert refused(["recover.1.compile=true"]).startswith("recover.1.compile: there is no C compiler")


def test_a_teacher_that_is_not_there() -> None:
    assert refused(["recover.1.teacher={source: ./no/such/model}"]).startswith("recover.1.teacher.source: ")


def test_a_wrong_word_for_the_teacher() -> None:
    assert "recover.1.teacher" in refused(["recover.1.teacher=recordet"])


@pytest.mark.parametrize(
    "override, key",
    [
        ("recover.1.divergence=kl", "recover.1.divergence"),
        ("recover.1.beta=1.0", "recover.1.beta"),
        ("recover.1.cross_entropy=1.0", "recover.1.cross_entropy"),
        ("recover.1.lora={rank: 4}", "recover.1.lora.rank"),
        ("recover.0.train=all", "recover.0.train"),
        ("recover.0.lora={r: 4}", "recover.0"),  # nothing trains adapters
        ("recover.1.beta=0.3", "recover.1"),
    ],
)
def test_wrong_values(override: str, key: str) -> None:
    assert refused([override]).startswith(f"{key}: ")


def test_recorded_probabilities_are_of_temperature_one() -> None:
    assert "temperature" in refused(["recover.1.teacher=recorded", "recover.1.final_temperature=2.0"])


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["recover.0.stream=student", "recover.0.trainer.gradient_checkpointing=true"], "gradient_checkpointing"),
        (["recover.0.train=lora", "recover.0.lora={targets: all}"], "set hidden"),
        (["recover.1.train=attention", "recover.1.trunk_learning_rate=0.5"], "trunk_learning_rate is for train: all"),
        (["recover.1.teacher={source: random, config: {model_type: gpt2}}"], "gpt2 has no trunk"),
    ],
)
def test_what_would_fail_or_do_nothing(overrides: list[str], words: str) -> None:
    assert words in refused(overrides)


def test_kinds_of_rows_are_not_mixed(tmp_path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    (tmp_path / "chat.yaml").write_text("path: chat.jsonl\ncolumns: {messages: messages}\n")
    assert "sample_train is text" in refused([f"recover.1.data=[sample_train,{tmp_path}/chat.yaml]"])
