"""Load and check datasets that a definition names (transmla.data.definition): from the hub or from files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Formatter
from typing import Any, TextIO

from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset, load_dataset_builder

from transmla.data.conversations import build_messages, message_columns, read_turns
from transmla.data.definition import FORMATS, DataDefinition, find_definition, format_of
from transmla.errors import RecipeError

SYNTHETIC = "synthetic"  # column beside `text`: whether a model wrote it; where no model did, it is missing


def local_files(definition: DataDefinition, folder: Path, key: str) -> list[Path]:
    """The files of a local dataset, sorted; empty for a hub dataset.

    Raises:
        RecipeError: there is none, or their format is unknown.
    """
    if definition.path is None:
        return []
    path = folder / definition.path
    files = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    if not files or not all(file.is_file() for file in files):
        raise RecipeError(key, f"no such file: {path}; correct the path in the data definition")
    if any(format_of(file) is None for file in files):
        raise RecipeError(key, f"{path}: unknown format; use one of {', '.join(FORMATS)}")
    return files


def check_dataset(name: str, key: str, *, online: bool, problems: bool = False) -> str:
    """Cheap checks before anything is loaded: the definition, its files, the columns of the first row, not empty.

    Args:
        online: ask the hub about a hub dataset (its columns, where it states them).
        problems: problems with answers are wanted, not text.

    Returns:
        what its rows are: `text`, `messages`, `completion` or `problems`.
    """
    definition, folder = find_definition(name, key)
    if problems and "problem" not in definition.columns:
        raise RecipeError(key, f"{name} has no problems; its definition must name the columns problem and answer")
    if not problems and "problem" in definition.columns:
        raise RecipeError(
            key, f"{name} has problems, not text; have the teacher write for them (write: kind traces), name @NAME"
        )
    if definition.hub is not None and online:
        with _hub_errors(definition, key):
            features = load_dataset_builder(**_hub_arguments(definition)).info.features
        if features is not None:
            _check_columns(definition, set(features), name, key)
    for file in local_files(definition, folder, key):
        columns = _first_row(file, key)
        if columns is None:
            raise RecipeError(key, f"{file} is empty; name a file that has text")
        _check_columns(definition, columns, str(file), key)
    return definition.kind


def _check_columns(definition: DataDefinition, columns: set[str], where: str, key: str) -> None:
    templates = [*definition.when_empty.values(), *([definition.template] if definition.template else [])]
    fields = [field for template in templates for _, field, _, _ in Formatter().parse(template) if field]
    fields += message_columns(definition.messages)
    if definition.turns is not None and definition.turns.system is not None:
        fields.append(definition.turns.system)
    for column in [*definition.columns.values(), *definition.when_empty, *fields]:
        if column not in columns:
            raise RecipeError(key, f"{where} has no column {column!r}; it has: {', '.join(sorted(columns))}")


def _hub_arguments(definition: DataDefinition) -> dict[str, Any]:
    """What names a hub dataset in `datasets`. Only data files are read: code of a repository is never run."""
    files = None if definition.files is None else {definition.split: definition.files}
    return {
        "path": definition.hub,
        "name": definition.subset,
        "revision": definition.revision,
        "data_files": files,
    }


@contextmanager
def _hub_errors(definition: DataDefinition, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # datasets' and the hub's errors derive from these
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(key, f"cannot load {definition.hub}: {reason}; correct the definition") from None


def _open(file: Path) -> TextIO:
    """A text file, packed by gzip or not."""
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")


def _first_row(file: Path, key: str) -> set[str] | None:
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet

        table = parquet.ParquetFile(file)
        return set(table.schema_arrow.names) if table.metadata.num_rows else None
    try:
        with _open(file) as lines:
            first = next((line for line in lines if line.strip()), None)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:  # no gzip, cut off, or not UTF-8
        raise RecipeError(key, f"{file} cannot be read: {error}; mend the file") from None
    if first is None:
        return None
    if format_of(file) == "text":
        return {"text"}
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise RecipeError(key, f"{file}: the first line is no JSON object; write one object per line")
    return set(row)


def load_one(name: str, key: str, *, joined: bool = False) -> Dataset:
    """Load a dataset with the columns that trl's trainers expect: text, messages, or prompt and completion.

    Args:
        joined: make one row of a definition whose rows are pieces of one text (its `join`); for training, where a row
            is a document that may be cut off, they stay apart, and empty ones are left out.

    Raises:
        RecipeError: missing, empty, or without a column that the definition names.
    """
    definition, _ = find_definition(name, key)
    data = load_rows(name, key)
    if definition.template is not None:
        data = data.map(lambda row: {"text": _fill(definition, row)}, remove_columns=data.column_names)
    elif definition.messages or definition.turns is not None:
        data = _conversations(data, definition, key)
    else:
        data = data.select_columns(list(definition.columns.values()))
        data = data.rename_columns({old: new for new, old in definition.columns.items() if old != new})
    if definition.join is not None:
        if joined and len(data):
            data = Dataset.from_dict({"text": [definition.join.join(data["text"])]})
        else:
            data = data.filter(lambda row: bool(row["text"].strip()))
    if not len(data):
        raise RecipeError(key, f"{name} is empty; name a dataset that has text")
    return _marked(data, True) if definition.synthetic and "text" in data.column_names else data


def _marked(data: Dataset, synthetic: bool) -> Dataset:
    return data.add_column(SYNTHETIC, [synthetic] * len(data))


def load_rows(name: str, key: str) -> Dataset:
    """The rows of a dataset with the columns of its files; its definition says what they mean.

    Raises:
        RecipeError: missing, or without a column that the definition names.
    """
    definition, folder = find_definition(name, key)
    data = _cut(_load_rows(definition, folder, key), definition, name, key)
    _check_columns(definition, set(data.column_names), name, key)
    return data


def _load_rows(definition: DataDefinition, folder: Path, key: str) -> Dataset:
    files = local_files(definition, folder, key)
    if definition.hub is not None:
        with _hub_errors(definition, key):
            arguments = _hub_arguments(definition)
            if definition.rows is None:
                return load_dataset(**arguments, split=definition.split)
            stream = load_dataset(**arguments, split=definition.split, streaming=True)
            return Dataset.from_list(list(stream.take(definition.rows)))
    kind = format_of(files[0])
    assert kind is not None, "local_files knows every format"
    if kind == "text":
        texts = []
        for file in files:
            with _open(file) as lines:
                texts.append(lines.read())
        rows = [
            part for text in texts for part in (text.split(definition.separator) if definition.separator else [text])
        ]
        data = Dataset.from_dict({"text": [row.strip() for row in rows if row.strip()]})
    else:
        data = load_dataset(kind, data_files=[str(file) for file in files], split="train")
    return data if definition.rows is None else data.select(range(min(definition.rows, len(data))))


def _cut(data: Dataset, definition: DataDefinition, name: str, key: str) -> Dataset:
    """The definition's part of rows that come without a split."""
    if definition.cut is None:
        return data
    if len(data) < 2:
        raise RecipeError(
            key, f"{name} has {len(data)} row, which cannot be cut into two parts; give a file of several"
        )
    border = min(max(1, len(data) * 9 // 10), len(data) - 1)
    return data.select(range(border)) if definition.cut == "train" else data.select(range(border, len(data)))


def _conversations(data: Dataset, definition: DataDefinition, key: str) -> Dataset:
    """The definition's conversations as `messages`, a list of role and content."""
    needed = message_columns(definition.messages)
    data = data.filter(lambda row: all(row[column] is not None for column in needed)) if needed else data

    def as_messages(row: dict[str, Any]) -> dict[str, Any]:
        if definition.turns is None:
            return {"messages": build_messages(definition.messages, row)}
        return {"messages": read_turns(definition.turns, row[definition.columns["messages"]], row, key)}

    features = Features({"messages": List({"role": Value("string"), "content": Value("string")})})
    return data.map(as_messages, remove_columns=data.column_names, features=features)


def _fill(definition: DataDefinition, row: dict[str, Any]) -> str:
    assert definition.template is not None
    for column, template in definition.when_empty.items():
        if not row[column]:
            return template.format(**row)
    return definition.template.format(**row)


def load_many(names: list[str], key: str, *, joined: bool = False) -> Dataset:
    """Several datasets of one kind, one after the other. joined: as in `load_one`."""
    return join_kinds(names, [load_one(name, key, joined=joined) for name in names], key)


def join_kinds(names: list[str], parts: list[Dataset], key: str) -> Dataset:
    """Concatenate datasets.

    Raises:
        RecipeError: they are of different kinds: texts, conversations, prompts with completions.
    """
    if any(SYNTHETIC in part.column_names for part in parts):
        unmarked = [{"text"} == set(part.column_names) for part in parts]
        parts = [_marked(part, False) if people else part for part, people in zip(parts, unmarked, strict=True)]
    columns = [tuple(sorted(set(part.column_names) - {SYNTHETIC})) for part in parts]
    if len(set(columns)) > 1:
        raise RecipeError(
            key, f"datasets of different kinds cannot be joined: {dict(zip(names, columns, strict=True))}"
        )
    return concatenate_datasets(parts)
