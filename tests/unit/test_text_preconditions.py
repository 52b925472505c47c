"""What is refused of data when the tokenizer is there: one line, before any weight is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_conversations import TURNS
from transmla.cli import main
from transmla.recipe.compose import load_recipe
from transmla.run.paths import reference_file
from transmla.sources.random_model import make_random_model

GOOD = "".join(json.dumps({"text": f"Sentence {index} about the sea."}) + "\n" for index in range(60))

Run = Callable[..., str]


@pytest.fixture
def run_of(tmp_path, monkeypatch, capsys) -> Run:
    """A run of the recipe `debug` whose tokenizer has a chat template or none; its line of error."""

    def run(template: str | None, *overrides: str, verb: str = "recover", end: bool = True) -> str:
        source = tmp_path / "source"
        make_random_model(load_recipe("debug").model, source)
        if template is not None:
            (source / "chat_template.jinja").write_text(template)
        if not end:
            file = source / "tokenizer_config.json"
            settings = json.loads(file.read_text())
            file.write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))
        monkeypatch.setattr("transmla.run.context.load_source", lambda *_: pytest.fail("weights were loaded"))
        words = [f"model.source={source}", f"output_dir={tmp_path}/out", "device=cpu", "~model.config", *overrides]
        assert main([verb, "recipe=debug", *words]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        return line

    return run


def chat(folder: Path, *rows: list) -> str:
    """A definition of conversations."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (folder / "d.yaml").write_text("path: a.jsonl\ncolumns: {messages: messages}\n")
    return f"['{folder}/d.yaml']"


ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "[{{ m.role }}] {{ m.content + '' }} {% endfor %}"
)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([{"role": "system", "content": "Be kind."}, *TURNS], "System role not supported"),
        ([TURNS[0], *TURNS], "Roles must alternate"),
        ([{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, TURNS[1]], "row 2: the chat template"),
    ],
)
@pytest.mark.parametrize("key", ["convert.calibration.data", "recover.0.data", "evaluate.data"])
def test_a_conversation_that_its_template_refuses(key: str, wrong: list, words: str, run_of: Run, tmp_path) -> None:
    """One line with file and row, before any weight is loaded."""
    line = run_of(ALTERNATING, f"{key}={chat(tmp_path, TURNS, wrong)}")
    assert line.startswith(f"error: {key}: {tmp_path}/a.jsonl, row 2: ") and words in line


def test_conversations_need_a_template(run_of: Run, tmp_path) -> None:
    assert "recover.0.data: it is of conversations, and the tokenizer has no chat template" in run_of(
        None, f"recover.0.data={chat(tmp_path, TURNS)}"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluate.data=[{}]"], "evaluate.data: the text has 3 tokens, fewer than one window of 128"),
        (["convert.calibration.data=[{}]"], "convert.calibration.data: the text has 3 tokens"),
        (["recover.1.data=[{}]"], "recover.1.data: the text has 3 tokens, fewer than one row of 128"),
        (["recover.1.data=[{{name: {}, weight: 1, min_tokens: 9}}]"], "recover.1.data: no row of"),
        (["evaluate.max_new_tokens=510"], "evaluate.max_new_tokens: 510 after a prompt of 7 tokens"),
    ],
)
def test_text_that_is_too_short_or_too_long(overrides: list[str], words: str, run_of: Run, tmp_path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text('{"text": "ab"}\n')
    assert words in run_of(None, *(override.format(file) for override in overrides))


def test_other_verbs_look_first_too(run_of: Run, tmp_path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text('{"text": "ab"}\n')
    assert "convert.calibration.data" in run_of(None, f"convert.calibration.data=[{file}]", verb="convert")
    assert "evaluate.data" in run_of(None, f"evaluate.data=[{file}]", verb="evaluate")


def test_sft_needs_an_end_token(run_of: Run) -> None:
    stage = "recover=[{kind: sft, data: [sample_train], tokens: 512, trainer: {max_length: 128, pad_token: a}}]"
    line = run_of(None, stage, end=False)
    assert "recover.0.trainer.eos_token: the tokenizer has no end token, and sft teaches when to end" in line


def test_a_system_message_that_the_template_does_not_know(run_of: Run) -> None:
    solve = "{name: s, problems: {generator: leg_counting, size: 2, system: Be kind.}, max_new_tokens: 8}"
    line = run_of(ALTERNATING, f"evaluate.solve=[{solve}]")
    assert line.startswith("error: evaluate.solve.0.problems: the chat template refuses it: System role not supported")


def test_replies_to_the_longest_problem_must_fit(run_of: Run) -> None:
    solve = "{name: s, problems: {generator: leg_counting, size: 2}, max_new_tokens: 500}"
    assert "evaluate.solve.0.max_new_tokens: 500 after a prompt of" in run_of(None, f"evaluate.solve=[{solve}]")


def test_prompts_for_a_students_own_text(run_of: Run, tmp_path) -> None:
    stage = "kind: on_policy, tokens: 5000, max_new_tokens: 8"
    line = run_of(None, f"recover=[{{{stage}, prompt_tokens: 500, data: [openings]}}]")
    assert "recover.0.data: no prompt can be made with prompt_tokens 500" in line
    line = run_of(ALTERNATING, f"recover=[{{{stage}, prompt_tokens: 9, data: {chat(tmp_path, [TURNS[0], *TURNS])}}}]")
    assert f"recover.0.data: {tmp_path}/a.jsonl, row 1: the chat template refuses it: Roles must alternate" in line


def test_every_dataset_has_a_reference_file_of_its_own(tmp_path) -> None:
    names = [
        "a/b.jsonl",
        "a_b.jsonl",
        "a__b.jsonl",
        "/a/b.jsonl",
        "A/B.jsonl",
        "a/b.jsonl#test",
        "x" * 300,
        "x" * 301,
        "",
    ]
    files = [reference_file(tmp_path, name) for name in names]
    assert len({str(file).lower() for file in files}) == len(names)
    assert all(file.parent == tmp_path and len(file.name) < 100 for file in files)
