"""Mixtures: shares of tokens, filters, and conversations in other shapes."""

import json
from pathlib import Path

import pytest
import yaml

from tests.unit.test_data import Letters
from transmla.data.inspection import check_dataset
from transmla.data.loading import load_many, load_one
from transmla.data.mixture import load_mixture, mixture_order
from transmla.errors import RecipeError
from transmla.recipe.data_lists import Part
from transmla.recipe.names import share
from transmla.recipe.validation import validate_recipe


def texts(folder: Path, name: str, letter: str, lengths: list[int]) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps({"text": letter * length}) for length in lengths))
    return str(file)


def share_of(letter: str, rows: list[str]) -> float:
    return sum(len(row) for row in rows if row[0] == letter) / sum(map(len, rows))


def test_weights_are_shares_of_tokens(tmp_path) -> None:
    """Rows of b are ten times as long as those of a: shares of rows would be far off."""
    a = texts(tmp_path, "a", "a", [5] * 400)
    b = texts(tmp_path, "b", "b", [50] * 400)
    entries = [Part(name=a, weight=0.3), Part(name=b, weight=0.7)]
    rows = load_mixture(entries, "k", Letters(), 0)["text"]
    assert share_of("a", rows) == pytest.approx(0.3, abs=0.01)
    assert share_of("a", rows[: len(rows) // 4]) == pytest.approx(0.3, abs=0.02)  # every prefix has the shares
    assert sum(len(row) for row in rows if row[0] == "a") == 2000  # the smaller one is used up, and not repeated
    assert rows == load_mixture(entries, "k", Letters(), 0)["text"]


def test_rows_are_drawn_by_the_seed_and_once() -> None:
    parts = [Part(name="a", weight=1.0), Part(name="b", weight=1.0)]
    lengths = [[3] * 50, [3] * 100]
    orders = [mixture_order(parts, lengths, seed).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1] and all(len(order) == len(set(order)) == 100 for order in orders)
    assert sorted(row for row in orders[0] if row < 50) == list(range(50))


def test_a_part_repeats_only_when_told() -> None:
    parts = [Part(name="a", weight=1.0, repeat=True), Part(name="b", weight=1.0)]
    order = mixture_order(parts, [[2] * 10, [2] * 35], 0).tolist()
    counts = [order.count(row) for row in range(10)]
    assert sum(counts) == 35 and set(counts) == {3, 4}
    assert sorted(row for row in order if row >= 10) == list(range(10, 45))


def test_filters_count_tokens(tmp_path) -> None:
    a = texts(tmp_path, "a", "a", [1, 5, 9, 20, 7, 6])
    b = texts(tmp_path, "b", "b", [30])
    rows = load_mixture([Part(name=a, min_tokens=5, max_tokens=9, rows=3), b], "k", Letters(), 0)["text"]
    assert [len(row) for row in rows] == [5, 9, 7, 30]
    with pytest.raises(RecipeError, match="recover.0.data.*no row .* 21 to 29 tokens"):
        load_mixture([Part(name=a, min_tokens=21, max_tokens=29)], "recover.0.data", Letters(), 0)


def tree(data: list, calibration: list) -> dict:
    stage = {"kind": "distill", "data": data, "tokens": 10}
    convert = {"calibration": {"data": calibration}}
    return {"name": "n", "model": {"source": "s"}, "convert": convert, "recover": [stage], "evaluate": {"data": ["x"]}}


@pytest.mark.parametrize(
    "entry,key,reason",
    [
        ({"name": "a", "weight": 0.0}, "recover.0.data.0.weight", "greater than or equal to 0"),
        ({"name": "a", "wieght": 0.5}, "recover.0.data.0.wieght", "did you mean weight"),
        ({"weight": 0.5}, "recover.0.data.0.name", "required"),
        ({"name": "a", "weight": 0.5}, "recover.0.data", "b has none"),
        ({"name": "a", "repeat": True}, "recover.0.data.0", "give it a weight"),
        ({"name": "a", "min_tokens": 9, "max_tokens": 3}, "recover.0.data.0", "no row can pass"),
        (3, "recover.0.data.0", "dictionary"),
    ],
)
def test_wrong_entries(entry: object, key: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason) as caught:
        validate_recipe(tree([entry, "b"], ["c"]))
    assert str(caught.value).startswith(f"{key}:")


def test_lists_of_names_stay_as_they_are() -> None:
    recipe = validate_recipe(tree(["a", "b"], ["c"]))
    assert recipe.recover[0].model_dump()["data"] == ["a", "b"]
    assert recipe.convert.calibration.data == ["c"]


def test_conversations_under_other_names(tmp_path) -> None:
    """A row of OpenThoughts' shape, with its shipped definition on a local file."""
    thought = "<|begin_of_thought|>\n\nTwo and two.\n\n<|end_of_thought|>"
    answer = f"{thought}\n\n<|begin_of_solution|>\n\nFour.\n\n<|end_of_solution|>"
    row = {
        "system": "Use the tags.",
        "conversations": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": answer}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    shipped = yaml.safe_load((share("data") / "openthoughts_114k.yaml").read_text())
    for name in ("hub", "subset", "split"):
        del shipped[name]
    definition = tmp_path / "mine.yaml"
    definition.write_text(yaml.safe_dump(shipped | {"path": "rows.jsonl"}, sort_keys=False))
    check_dataset(str(definition), "k", online=False)
    wanted = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nFour."},
    ]
    assert load_one(str(definition), "k")[0] == {"messages": wanted}

    shipped["turns"]["system"] = "system"
    definition.write_text(yaml.safe_dump(shipped | {"path": "rows.jsonl"}, sort_keys=False))
    assert load_one(str(definition), "k")[0]["messages"] == [{"role": "system", "content": "Use the tags."}, *wanted]

    shipped["turns"]["roles"] = {"user": "user", "gpt": "assistant"}
    definition.write_text(yaml.safe_dump(shipped | {"path": "rows.jsonl"}, sort_keys=False))
    with pytest.raises(RecipeError, match="role 'assistant'; add it to turns.roles"):
        load_one(str(definition), "k")


def test_conversations_from_columns(tmp_path, monkeypatch) -> None:
    """Rows of s1K's shape through its shipped definition; they join conversations whose keys are in another order."""
    rows = [
        {"question": "2+2?", "deepseek_thinking_trajectory": "Two and two.", "deepseek_attempt": "{4}", "cot": None},
        {"question": "3+3?", "deepseek_thinking_trajectory": None, "deepseek_attempt": None, "cot": None},
    ]
    (tmp_path / "s1k_1.1").mkdir()
    (tmp_path / "s1k_1.1" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "s1k_1.1" / "test.jsonl").write_text(json.dumps(rows[0]))
    monkeypatch.setenv("TRANSMLA_DATA", str(tmp_path))
    check_dataset("s1k_1.1", "k", online=False)
    wanted = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n{4}"},
    ]
    assert load_one("s1k_1.1", "k").to_list() == [{"messages": wanted}]

    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"content": "hi", "role": "user"}]}))
    (tmp_path / "chat.yaml").write_text("path: chat.jsonl\ncolumns: {messages: messages}\n")
    joined = load_many(["s1k_1.1", str(tmp_path / "chat.yaml")], "k")
    assert joined["messages"] == [wanted, [{"role": "user", "content": "hi"}]]


@pytest.mark.parametrize(
    "text,reason",
    [
        ("path: a.jsonl\nmessages: [{role: user, content: '{q}'}]\ncolumns: {text: t}", "leave columns"),
        ("path: a.jsonl\ncolumns: {text: t}\nturns: {role: from}", "columns: {messages: ...}"),
        ("path: a.jsonl\nmessages: [{role: gpt, content: '{q}'}]", "messages.0.role"),
    ],
)
def test_wrong_definitions(text: str, reason: str, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=reason):
        check_dataset(str(tmp_path / "mine.yaml"), "k", online=False)


def test_a_template_of_messages_names_columns_that_exist(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "2+2?"}))
    (tmp_path / "mine.yaml").write_text("path: a.jsonl\nmessages: [{role: user, content: '{question}'}]\n")
    with pytest.raises(RecipeError, match="no column 'question'"):
        check_dataset(str(tmp_path / "mine.yaml"), "k", online=False)
