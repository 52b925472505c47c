"""The four sets of the published command: their definitions, local copies, and what the hub is asked for."""

import json
from types import SimpleNamespace
from uuid import uuid4

import pytest
import yaml
from datasets import Dataset, IterableDataset

from tests.unit.test_data import Letters
from transmla.data.definition import find_definition
from transmla.data.inspection import check_dataset
from transmla.data.loading import load_one
from transmla.data.windows import token_windows
from transmla.errors import RecipeError
from transmla.recipe.names import share

SETS = ("wikitext2", "ptb", "c4", "alpaca")
ROWS = {
    "wikitext2": {"text": " = A title = \n"},
    "ptb": {"sentence": "no it was n't black monday"},
    "c4": {"text": "A page.", "url": "u", "timestamp": "t"},
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "ignored"},
}


def numbered(name: str, count: int, start: int = 0) -> list[dict]:
    return [{**ROWS[name], next(iter(ROWS[name])): f"row {index}"} for index in range(start, start + count)]


def write(file, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        Dataset.from_list(rows).to_parquet(file)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("suffix", ["", "_test"])
def test_definitions_state_licence_and_content(name: str, suffix: str) -> None:
    content = yaml.safe_load((share("data") / f"{name}{suffix}.yaml").read_text())
    assert content["licence"] != "unknown" and len(content["about"]) > 20
    definition, _ = find_definition(name + suffix, "k")
    assert definition.local == name and definition.hub is not None


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("layout", ["one jsonl", "one parquet", "train alone", "splits"])
def test_local_copies(name: str, layout: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRANSMLA_DATA", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda **arguments: pytest.fail("asked the hub"))
    if layout.startswith("one"):
        write(tmp_path / f"{name}.{layout[4:]}", numbered(name, 20))
    else:
        write(tmp_path / name / "train-00000-of-00001.parquet", numbered(name, 20))
    if layout == "splits":
        write(tmp_path / name / "test.parquet", numbered(name, 7, start=20))
    for definition in (name, f"{name}_test"):
        check_dataset(definition, "k", online=True)
    train, test = load_one(name, "k")["text"], load_one(f"{name}_test", "k")["text"]
    assert (len(train), len(test)) == ((20, 7) if layout == "splits" else (18, 2))
    assert not set(train) & set(test)
    assert "row 0" in train[0] and ("row 20" if layout == "splits" else "row 18") in test[0]


def test_a_local_text_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRANSMLA_DATA", str(tmp_path))
    (tmp_path / "wikitext2.txt").write_text("\n".join(f"line {index}" for index in range(10)))
    assert load_one("wikitext2", "k")["text"][0] == "line 0"
    assert load_one("wikitext2_test", "k")["text"] == ["line 9"]


def test_a_set_that_the_directory_lacks_comes_from_the_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRANSMLA_DATA", str(tmp_path))
    assert find_definition("ptb", "k")[0].hub is not None
    (tmp_path / "ptb").mkdir()
    with pytest.raises(RecipeError, match="has no file train"):
        find_definition("ptb", "k")
    monkeypatch.setenv("TRANSMLA_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="TRANSMLA_DATA"):
        find_definition("ptb", "k")


ASKED = {
    "wikitext2": dict(
        path="Salesforce/wikitext", name="wikitext-2-raw-v1", revision=None, data_files=None, split="train"
    ),
    "wikitext2_test": dict(
        path="Salesforce/wikitext", name="wikitext-2-raw-v1", revision=None, data_files=None, split="test"
    ),
    "ptb_test": dict(
        path="ptb-text-only/ptb_text_only",
        name=None,
        revision="refs/convert/parquet",
        data_files={"test": "penn_treebank/test/*.parquet"},
        split="test",
    ),
    "c4": dict(
        path="allenai/c4",
        name=None,
        revision=None,
        data_files={"train": "en/c4-train.00000-of-01024.json.gz"},
        split="train",
        streaming=True,
    ),
    "alpaca_test": dict(path="tatsu-lab/alpaca", name=None, revision=None, data_files=None, split="train"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_the_hub_is_asked_for(name: str, monkeypatch) -> None:
    """Data files only: no argument that would let a repository's code run."""
    monkeypatch.delenv("TRANSMLA_DATA", raising=False)
    rows = numbered(name.removesuffix("_test"), 30)
    asked = []

    def answer(**arguments: object) -> Dataset | IterableDataset:
        asked.append(arguments)
        return Dataset.from_list(rows).to_iterable_dataset() if arguments.get("streaming") else Dataset.from_list(rows)

    monkeypatch.setattr("transmla.data.loading.load_dataset", answer)
    monkeypatch.setattr("transmla.data.loading.load_dataset_builder", lambda **_: SimpleNamespace(hash=uuid4().hex))
    assert len(load_one(name, "k")) == (3 if name == "alpaca_test" else 30)
    assert asked == [ASKED[name]]


def test_alpacas_template(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRANSMLA_DATA", str(tmp_path))
    write(tmp_path / "alpaca.jsonl", [ROWS["alpaca"], {**ROWS["alpaca"], "input": ""}, ROWS["alpaca"]])
    full, short = load_one("alpaca", "k")["text"]
    assert full.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3\n")
    assert short.endswith("### Instruction:\nAdd.\n\n### Response:\n3\n") and "further context" not in short


def test_pieces_of_one_text_are_joined_for_windows(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRANSMLA_DATA", str(tmp_path))
    write(tmp_path / "wikitext2" / "train.jsonl", [{"text": "ab"}, {"text": ""}, {"text": "cd"}])
    write(tmp_path / "wikitext2" / "test.jsonl", [{"text": "x"}])
    assert load_one("wikitext2", "k", joined=True)["text"] == ["ab\n\n\n\ncd"]
    assert load_one("wikitext2", "k")["text"] == ["ab", "cd"]


def test_any_dataset_can_be_cut(tmp_path) -> None:
    file = tmp_path / "mine.jsonl"
    write(file, [{"text": f"row {index}"} for index in range(10)])
    assert load_one(f"{file}#test", "k")["text"] == ["row 9"]
    assert len(load_one(f"{file}#train", "k")) == 9
    with pytest.raises(RecipeError, match="cut already"):
        load_one("alpaca#test", "k")
    with pytest.raises(RecipeError, match="train .* or test"):
        load_one(f"{file}#dev", "k")
    file.write_text(json.dumps({"text": "alone"}))
    with pytest.raises(RecipeError, match="cannot be cut"):
        load_one(f"{file}#test", "k")


def test_random_windows() -> None:
    data = Dataset.from_dict({"text": ["abcdefghijklmnopqrstuvwxyz" * 4]})
    one, same, other = (token_windows(data, Letters(), tokens=12, length=4, seed=seed) for seed in (1, 1, 2))
    assert one.tolist() == same.tolist() != other.tolist()
    assert one.shape == (3, 4)
