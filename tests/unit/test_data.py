"""Definitions of datasets and windows of tokens."""

import gzip
import json

import pytest
from datasets import Dataset

from transmla.data.inspection import check_dataset
from transmla.data.loading import load_many, load_one
from transmla.data.windows import token_windows
from transmla.errors import RecipeError
from transmla.recipe.names import share


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 0

    def __call__(
        self, texts: list[str], add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_windows_cut_a_stream_of_documents() -> None:
    data = Dataset.from_dict({"text": ["abc", "de", "fghij"]})
    windows = token_windows(data, Letters(), tokens=9, length=4)
    assert windows.tolist() == [[97, 98, 99, 0], [100, 101, 0, 102]]
    with pytest.raises(ValueError, match="fewer than one window"):
        token_windows(data, Letters(), tokens=64, length=64)


def test_calibration_and_evaluation_samples_are_disjoint() -> None:
    train, heldout = load_one("sample_train", "k"), load_one("sample_heldout", "k")
    assert not set(train["text"]) & set(heldout["text"])
    assert sum(map(len, train["text"])) > 700_000 and sum(map(len, heldout["text"])) > 150_000


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt", "jsonl.gz", "txt.gz"])
def test_local_formats(suffix: str, tmp_path) -> None:
    """A definition may lie anywhere; its path is relative to it."""
    (tmp_path / "text").mkdir()
    file = tmp_path / "text" / f"data.{suffix}"
    rows = [{"body": "one"}, {"body": "zwölf"}]
    kind, _, packed = suffix.partition(".")
    content = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else "one\n<|doc|>\nzwölf"
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    definition = tmp_path / "mine.yaml"
    columns = "columns: {text: text}\nseparator: '<|doc|>'" if kind == "txt" else "columns: {text: body}"
    definition.write_text(f"path: text/{file.name}\n{columns}\nlicence: mine\n")
    check_dataset(str(definition), "k", online=False)
    assert load_one(str(definition), "k")["text"] == ["one", "zwölf"]
    if kind != "jsonl":
        return
    file.write_text(json.dumps({"text": "plain"})) if not packed else file.write_bytes(
        gzip.compress(b'{"text": "plain"}')
    )
    check_dataset(str(file), "k", online=False)  # a file named directly
    assert load_one(str(file), "k")["text"] == ["plain"]


def test_a_file_that_is_no_gzip_is_refused(tmp_path) -> None:
    for name, content in (("plain.txt.gz", b"text"), ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:-20])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError, match="cannot be read"):
            check_dataset(str(tmp_path / name), "k", online=False)


def test_template(tmp_path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": "2+2", "a": "4"}))
    definition = tmp_path / "mine.yaml"
    definition.write_text('path: data.jsonl\ntemplate: "Q: {q}\\nA: {a}"\n')
    check_dataset(str(definition), "k", online=False)
    (row,) = load_one(str(definition), "k")
    assert row == {"text": "Q: 2+2\nA: 4"}


def test_openings_are_what_their_script_makes() -> None:
    folder = share("data") / "openings"
    made: dict = {"__name__": "build"}
    exec((folder / "build.py").read_text(), made)
    assert load_one("openings", "k")["text"] == made["openings"]()
    assert len(set(made["openings"]())) == len(made["openings"]()) > 2000


@pytest.mark.parametrize(
    "text,reason",
    [
        ("columns: {text: text}", "exactly one of hub and path"),
        ("path: a.jsonl\ncolumns: {prompt: p}", "prompt and completion"),
        ("path: a.jsonl\ncolumns: {messages: m}\nsynthetic: true", "synthetic is for text"),
        ("path: a.jsonl\ncolums: {text: t}", "colums"),
    ],
)
def test_wrong_definitions(text: str, reason: str, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=reason):
        check_dataset(str(file), "recover.0.data", online=False)


def test_a_template_names_columns_that_exist(tmp_path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": "2+2"}))
    definition = tmp_path / "mine.yaml"
    definition.write_text("path: data.jsonl\ntemplate: 'Q: {question}'\n")
    with pytest.raises(RecipeError, match="no column 'question'"):
        check_dataset(str(definition), "k", online=False)


def test_conversations_get_their_special_tokens_from_the_template_alone() -> None:
    class Chat(Letters):
        def __call__(self, texts: list[str], add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list]:
            return {"input_ids": [[1] * add_special_tokens + [ord(letter) for letter in text] for text in texts]}

        def apply_chat_template(self, messages: list[dict], tokenize: bool) -> str:
            return "".join(turn["content"] for turn in messages)

    turn = [{"role": "user", "content": "a"}]
    for rows in ({"messages": [turn]}, {"prompt": [turn[:0]], "completion": [turn]}):
        assert token_windows(Dataset.from_dict(rows), Chat(), tokens=2, length=2).tolist() == [[97, 0]]


def test_kinds_do_not_mix(tmp_path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    (tmp_path / "chat.yaml").write_text("path: chat.jsonl\ncolumns: {messages: messages}\n")
    with pytest.raises(RecipeError, match="different kinds"):
        load_many(["sample_train", str(tmp_path / "chat.yaml")], "k")
