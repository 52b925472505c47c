"""Files and rows that cannot be used: one line with file and row, in the plan, for every list of data."""

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from transmla.data import inspection
from transmla.data.inspection import check_dataset
from transmla.data.loading import load_one
from transmla.errors import RecipeError
from transmla.plan.checks import prepare
from transmla.recipe.compose import load_recipe

GOOD = "".join(json.dumps({"text": f"Sentence {index} about the sea."}) + "\n" for index in range(60))


def refused(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe("debug", ["device=cpu", *overrides]))
    message = str(caught.value)
    assert "\n" not in message
    return message


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 0x55
    return bytes(changed)


def parquet(**columns: list) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


FAULTS = {
    "a number": ("a.jsonl", GOOD + '{"text": 5}\n', "a.jsonl, row 61: text is a number (5)"),
    "a list": ("a.jsonl", GOOD + '{"text": ["a"]}\n', "row 61: text is a list"),
    "an object": ("a.jsonl", GOOD + '{"text": {"a": "b"}}\n', "row 61: text is an object"),
    "a truth value": ("a.jsonl", GOOD + '{"text": true}\n', "row 61: text is a truth value"),
    "a column less": ("a.jsonl", GOOD + '{"other": "x"}\n', "row 61: there is no column 'text'; it has: other"),
    "a key twice": ("a.jsonl", GOOD + '{"text": "a", "text": "b"}\n', "row 61: the key 'text' stands there twice"),
    "a cut last line": ("a.jsonl", GOOD + '{"text": "half of a', "row 61 is no JSON object"),
    "an array": ("a.jsonl", '[{"text": "a"}]', "row 1 is no JSON object"),
    "brackets without end": ("a.jsonl", "[" * 100_000, "row 1"),
    "a row after blank lines": ("a.jsonl", "\n\r\n" + GOOD + "{\n", "row 63 is no JSON object"),
    "half of a letter": ("a.jsonl", GOOD + '{"text": "a\\ud800b"}\n', "row 61 has half of a letter"),
    "a bad byte": ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', "row 61: byte 11 is not UTF-8"),
    "UTF-16": ("a.jsonl", GOOD.encode("utf-16"), "is in UTF-16"),
    "a bad byte in text": ("a.txt", GOOD.encode() + b"\xff\xfe", "line 61 is not UTF-8"),
    "zero bytes": ("a.txt", b"ab\n\0\0", "line 2 has zero bytes"),
    "only null": ("a.jsonl", '{"text": null}\n' * 9, "has no row with text in it"),
    "only blank text": ("a.jsonl", '{"text": " \\n"}\n' * 9, "has no row with text in it"),
    "an empty file": ("a.jsonl", "", "is empty"),
    "blank lines": ("a.jsonl", "\n \n\r\n", "is empty"),
    "a blank text file": ("a.txt", " \n\n", "has no row with text in it"),
    "an empty gzip": ("a.jsonl.gz", gzip.compress(b""), "is empty"),
    "no gzip": ("a.jsonl.gz", GOOD, "it is not packed by gzip"),
    "a cut gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "its packed content is cut off"),
    "a flipped gzip": ("a.txt.gz", flipped(gzip.compress(GOOD.encode()), -6), "it is damaged"),
    "no parquet": ("a.parquet", b"text" * 99, "cannot be read as parquet"),
    "an empty parquet": ("a.parquet", b"", "cannot be read as parquet"),
    "a cut parquet": ("a.parquet", parquet(text=["a"] * 99)[:-99], "cannot be read as parquet"),
    "a damaged parquet": (
        "a.parquet",
        parquet(text=["sea" * 9]).replace(b"se", b"s\xff"),
        "cannot be read as parquet",
    ),
    "a parquet without rows": ("a.parquet", parquet(text=pa.array([], pa.string())), "is empty"),
    "another column": ("a.parquet", parquet(body=["a"]), "has no column 'text'; it has: body"),
    "numbers in parquet": ("a.parquet", parquet(text=[1, 2]), "row 1: text is a number"),
    "an unknown format": ("a.csv", "text\na\n", "unknown format; use one of .jsonl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_row(fault: str, tmp_path) -> None:
    name, content, words = FAULTS[fault]
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    message = refused(f"recover.0.data=['{file}']")
    assert message.startswith("recover.0.data: ") and words in message and name in message


def test_every_list_is_looked_at(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD + '{"text": 5}\n')
    written = (
        f"write=[{{name: w, kind: text, tokens: 9, max_new_tokens: 8, prefix_tokens: 2, prefix_data: ['{file}']}}]"
    )
    for key, override in {
        "convert.calibration.data": f"convert.calibration.data=['{file}']",
        "evaluate.data": f"evaluate.data=['{file}']",
        "recover.1.data": f"recover.1.data=[{{name: '{file}', weight: 1}}]",
        "write.0.prefix_data": written,
    }.items():
        assert refused(override).startswith(f"{key}: {file}, row 61: text is a number")
    (tmp_path / "p.jsonl").write_text('{"q": "1+1?", "a": 2}\n{"q": "2+2?", "a": [4]}\n')
    (tmp_path / "p.yaml").write_text("path: p.jsonl\ncolumns: {problem: q, answer: a}\n")
    solve = f"evaluate.solve=[{{name: s, max_new_tokens: 8, problems: {tmp_path}/p.yaml}}]"
    assert refused(solve).startswith(f"evaluate.solve.0.problems.data: {tmp_path}/p.jsonl, row 2: a is a list")


def test_a_large_file_is_seen_in_part_and_read_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transmla.data.records.BEGINNING", 100)
    monkeypatch.setattr(inspection, "LIMIT", 1000)
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD + '{"text": 5}\n')
    check_dataset(str(file), "k", online=False)
    with pytest.raises(RecipeError, match="k: .*a.jsonl, row 61: text is a number"):
        load_one(str(file), "k")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_empty_rows_are_left_out_and_counted(suffix: str, tmp_path) -> None:
    file, said = tmp_path / f"a.{suffix}", []
    texts = ["one", None, "two", " "]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    file.write_bytes(rows if suffix == "jsonl" else parquet(text=texts))
    check_dataset(str(file), "k", online=False)
    assert load_one(str(file), "recover.0.data", say=said.append)["text"] == ["one", "two"]
    assert said == [f"[data] recover.0.data: 2 of 4 rows of {file} are empty and left out"]


HUB = "hub: org/set\ncolumns: {{{0}: {0}}}\n"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("column", "rows", "words"),
    [
        ("text", [5, 6], "row 1: text is a number (5)"),
        ("text", [{"a": "b"}] * 3, "row 1: text is an object"),
        ("text", [["a"], None, ["b"]], "row 1: text is a list"),
        ("messages", [[{"role": role, "content": "a"}] for role in ("user", "human")], "row 2: turn 1 has the role"),
        ("messages", ["[]", "[]"], "row 1: the conversation is text"),
    ],
)  # fmt: skip
def test_rows_of_a_hub_get_the_same_line(column, rows, words, streamed, tmp_path, monkeypatch) -> None:
    data = Dataset.from_dict({column: rows})
    answer = data.to_iterable_dataset() if streamed else data
    monkeypatch.setattr("transmla.data.loading.load_dataset", lambda **_: answer)
    monkeypatch.setattr("transmla.data.loading.load_dataset_builder", lambda **_: SimpleNamespace(hash=uuid4().hex))
    (tmp_path / "d.yaml").write_text(HUB.format(column) + ("rows: 9\n" if streamed else ""))
    with pytest.raises(RecipeError) as caught:
        load_one(str(tmp_path / "d.yaml"), "recover.0.data")
    assert str(caught.value).startswith("recover.0.data: org/set, row ") and words in str(caught.value)


@pytest.mark.parametrize("streamed", [False, True])
def test_empty_rows_of_a_hub_are_counted(streamed: bool, tmp_path, monkeypatch) -> None:
    data = Dataset.from_dict({"text": ["a", None, " ", "b"], "other": [1, 2, 3, 4]})
    answer = data.to_iterable_dataset() if streamed else data
    monkeypatch.setattr("transmla.data.loading.load_dataset", lambda **_: answer)
    monkeypatch.setattr("transmla.data.loading.load_dataset_builder", lambda **_: SimpleNamespace(hash=uuid4().hex))
    (tmp_path / "d.yaml").write_text(HUB.format("text") + ("rows: 9\n" if streamed else ""))
    said: list[str] = []
    assert load_one(str(tmp_path / "d.yaml"), "k", say=said.append).to_dict() == {"text": ["a", "b"]}
    assert "2 of 4 rows" in said[0]


def test_a_changed_file_is_read_again(tmp_path) -> None:
    """Of equal size, and with the time that it had."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}')
    before = file.stat()
    assert load_one(str(file), "k")["text"] == ["one"]
    file.write_text('{"text": "two"}')
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_one(str(file), "k")["text"] == ["two"]


def test_names_and_marks_that_are_no_faults(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a[1]").mkdir()
    for name in ("data[1].jsonl", "a[1]/x.jsonl", "what?.jsonl", "a#b.jsonl", "LARGE.JSONL"):
        Path(name).write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\r\n{"text": "two"}\r\n')
        check_dataset(name, "k", online=False)
        assert load_one(name, "k")["text"] == ["one", "two"]
    assert load_one("a#b.jsonl#test", "k")["text"] == ["two"]
    assert load_one("~/data[1].jsonl", "k")["text"] == ["one", "two"]
    Path("a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert load_one("a.txt", "k")["text"] == ["one\ntwo"]
    Path("b").mkdir()
    Path("b/1.jsonl").write_text('{"text": "one"}')
    Path("b/2.txt").write_text("two")
    Path("b/3.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}'))
    Path("all.yaml").write_text("path: b/*\ncolumns: {text: text}\n")
    assert load_one("all.yaml", "k")["text"] == ["one", "two", "three"]  # each by its own format
    dates = '{"text": "2024-01-01"}\n'  # a reader that guesses types makes times of them
    Path("dates.jsonl").write_text(dates)
    assert load_one("dates.jsonl", "k")["text"] == ["2024-01-01"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "empty name"),
        ("folder.jsonl", "folder.jsonl is a folder"),
        ("folder", "folder is a folder"),
        ("gone.jsonl", "no such file: "),
        ("gone.yaml", "no such file: gone.yaml"),
        ("loop.jsonl", "is a link that leads nowhere"),
        ("~nobody-is-called-so/a.jsonl", "there is no such home"),
        ("../data/ptb", "no dataset"),
        ("x" * 300, "no dataset"),
        ("x" * 300 + ".jsonl", "no such file"),
        ("d.csv", "unknown format"),
        ("plain", "unknown format"),
    ],
)
def test_names_of_nothing(name: str, words: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_text(GOOD)
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(RecipeError, match="^k: ") as caught:
        check_dataset(name, "k", online=False)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path: [", "not valid YAML"),
        ("- a", "no data definition"),
        ("", "no data definition"),
        ("path: a.jsonl\npath: b.jsonl\ncolumns: {text: text}", "says 'path' twice (line 1)"),
        ("path: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: &a [*a]\npath: a.jsonl", "nested too deeply"),
        ("x0: &x0 z\n" + "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 24)), "aliases expanded"),
        ("path: a.jsonl\ntemplate: '{text'", "is broken"),
        ("path: a.jsonl\ntemplate: '{text.__class__}'", "{text.__class__} is more than the name of a column"),
        ("path: a.jsonl\ntemplate: '{text:1000000000}'", "{text:1000000000} is more than"),
        ("path: a.jsonl\ntemplate: '{0}'", "{0} is more than"),
        ("path: a.jsonl\nmessages: [{role: user, content: '{text!r}'}]", "{text!r} is more than"),
        ("path: a.jsonl\ncolumns: {text: text}\nseparator: x", "separator is for .txt files"),
        ("path: a.jsonl\ncolumns: {text: text}\nlocal: ../x", "local"),
        ("path: a.jsonl\ncolumns: {text: text}\ntools: x", "tools is for conversations"),
    ],
)  # fmt: skip
def test_definitions_that_mean_nothing(content: str, words: str, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "d.yaml").write_text(content)
    with pytest.raises(RecipeError) as caught:
        check_dataset(str(tmp_path / "d.yaml"), "k", online=False)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_rows_of_a_template(tmp_path) -> None:
    """A null says nothing, and never becomes the word None; a list is no text."""
    file, definition = tmp_path / "a.jsonl", tmp_path / "d.yaml"
    definition.write_text("path: a.jsonl\ntemplate: '{q}: {a}'\n")
    file.write_text('{"q": "x", "a": 1}\n{"q": "y", "a": null}\n')
    assert load_one(str(definition), "k")["text"] == ["x: 1"]
    file.write_text('{"q": "x", "a": 1}\n{"q": "y", "a": [1]}\n')
    with pytest.raises(RecipeError, match="row 2: a is a list"):
        check_dataset(str(definition), "k", online=False)


def test_links_in_the_users_own_copies(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRANSMLA_DATA", str(tmp_path / "sets"))
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "wikitext2").symlink_to(tmp_path / "gone")
    with pytest.raises(RecipeError, match="wikitext2 is a link that leads nowhere"):
        check_dataset("wikitext2", "k", online=False)
    (tmp_path / "elsewhere[1]").mkdir()
    (tmp_path / "elsewhere[1]" / "train.jsonl").write_text(GOOD)
    (tmp_path / "sets" / "c4").symlink_to(tmp_path / "elsewhere[1]")
    assert len(load_one("c4", "k")) == 54


def test_the_same_rows_twice(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    assert "evaluate.data: a.jsonl is named twice" in refused("evaluate.data=[a.jsonl, a.jsonl]")
    assert "the rows of b.jsonl, as a.jsonl, are named twice" in refused("recover.0.data=[a.jsonl, b.jsonl]")
    parts = "{name: a.jsonl, weight: 1, max_tokens: 9}, {name: a.jsonl, weight: 2, min_tokens: 10}"
    prepare(load_recipe("debug", ["device=cpu", f"recover.0.data=[{parts}]"]))
    prepare(load_recipe("debug", ["device=cpu", "recover.0.data=['a.jsonl#train', 'a.jsonl#test']"]))


def test_names_of_written_sets_stay_apart() -> None:
    def names(*found: str) -> str:
        return (
            "write=[" + ", ".join(f"{{name: {name}, kind: text, tokens: 9, max_new_tokens: 8}}" for name in found) + "]"
        )

    assert refused(names("own", "OWN")).startswith("write: two entries are called OWN")


def test_rows_are_no_longer_than_the_models_positions_by_default() -> None:
    assert refused("~recover.1.trainer.max_length").startswith("recover.1.trainer.max_length: rows have 1024 tokens")
