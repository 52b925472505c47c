"""Load datasets that a definition names (transmla.data.definition): from the hub or from files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as compute
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from transmla.data.conversations import MORE
from transmla.data.definition import DataDefinition, find_definition, local_files
from transmla.data.hub_questions import check_columns, hub_arguments, hub_errors
from transmla.data.reading import ROWS, Unreadable, mark_of
from transmla.data.records import COLUMNS, Record, empty_record, record_of, records
from transmla.errors import RecipeError

SYNTHETIC = "synthetic"  # column beside `text`: whether a model wrote it; where no model did, it is missing

READER = 1  # raise it when the same file would give other records: Datasets keeps what was read

_CONVERSATION = List({"role": Value("string"), "content": Value("string")})

Say = Callable[[str], None]


def _features_of(definition: DataDefinition, first: Record | None) -> Features:
    """The types of a definition's records. first: one of them that is not empty."""
    turns = definition.kind == "messages" or (first is not None and isinstance(first.get("prompt"), list))
    columns = COLUMNS[definition.kind]
    return Features({name: _CONVERSATION if turns and name != MORE else Value("string") for name in columns})


def load_one(name: str, key: str, *, joined: bool = False, say: Say | None = None) -> Dataset:
    """Load a dataset as records (transmla.data.records): text, conversations, prompts with completions, or problems.

    Args:
        joined: make one row of a definition whose rows are pieces of one text (its `join`); for training, where a row
            is a document that may be cut off, they stay apart, and empty ones are left out.
        say: is told how many rows were empty and are left out.

    Raises:
        RecipeError: missing, empty, without a column that the definition names, or with a row that cannot be used.
    """
    definition, folder = find_definition(name, key)
    data = _from_hub(definition, key) if definition.hub is not None else _from_files(definition, folder, key)
    data = _cut(_without_empty(data, definition, name, key, say), definition, name, key)
    if definition.join is not None:
        if joined and len(data):
            data = Dataset.from_dict({"text": [definition.join.join(data["text"])]})
        else:
            data = data.filter(lambda row: bool(row["text"].strip()))
    if not len(data):
        raise RecipeError(key, f"{name} is empty; name a dataset that has text")
    return _marked(data, True) if definition.synthetic and "text" in data.column_names else data


def _marked(data: Dataset, synthetic: bool) -> Dataset:
    return data.add_column(SYNTHETIC, np.full(len(data), synthetic))


def _from_files(definition: DataDefinition, folder: Path, key: str) -> Dataset:
    """The records of local files. Datasets keeps them on disk, and reads again what has changed."""
    files = local_files(definition, folder, key)
    with _unreadable(key):
        first = _first_full(record for _, record in records(definition, files))
        return _kept(_generate, definition, first, marks=tuple(map(mark_of, files)))


def _kept(make: Callable[..., Iterator[Record]], definition: DataDefinition, first: Record | None, **state: Any) -> Any:
    """What `make` yields, on disk. It is read once for a definition and a state of its source."""
    return Dataset.from_generator(
        make,
        features=_features_of(definition, first),
        gen_kwargs={"definition": definition.model_dump_json(exclude_unset=True), **state, "reader": READER},
        writer_batch_size=ROWS,
    )


@contextmanager
def _unreadable(key: str) -> Iterator[None]:
    """Names the key of the recipe for a file or row that cannot be used."""
    try:
        yield
    except Unreadable as error:
        raise RecipeError(key, str(error)) from None
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, Unreadable):
            raise RecipeError(key, str(error.__cause__)) from None
        raise


def _generate(definition: str, marks: tuple[tuple[Any, ...], ...], reader: int) -> Iterator[Record]:
    files = [Path(mark[0]) for mark in marks]
    for _, record in records(DataDefinition.model_validate_json(definition), files):
        yield record


def _from_hub(definition: DataDefinition, key: str) -> Dataset:
    """The records of a hub dataset."""
    assert definition.hub is not None
    with hub_errors(definition, key), _unreadable(key):
        arguments = hub_arguments(definition)
        if definition.rows is not None:
            commit = load_dataset_builder(**arguments).hash
            # Of texts or of turns: only of these the hub must be asked for a row.
            first = _first_full(_streamed(definition)) if definition.kind == "completion" else None
            return _kept(_generate_streamed, definition, first, commit=commit)
        data = load_dataset(**arguments, split=definition.split)
    check_columns(definition, set(data.column_names), definition.hub, key)
    data = data.select_columns([name for name in definition.read_columns() if name in data.column_names])
    if definition.kind == "text" and definition.template is None:
        column = definition.columns["text"]
        if data.features[column] in (Value("string"), Value("large_string")):
            return data if column == "text" else data.rename_column(column, "text")
    with _unreadable(key):
        first = _first_full(_hub_record(row, number, definition) for number, row in enumerate(data))
        return data.map(
            _hub_record,
            with_indices=True,
            remove_columns=data.column_names,
            features=_features_of(definition, first),
            fn_kwargs={"definition": definition, "reader": READER},
            desc=f"Reading {definition.hub}",
        )


def _streamed(definition: DataDefinition) -> Iterator[Record]:
    assert definition.rows is not None, "the other hub datasets are downloaded"
    stream = load_dataset(**hub_arguments(definition), split=definition.split, streaming=True)
    for number, row in enumerate(stream.take(definition.rows)):
        yield _hub_record(row, number, definition)


def _generate_streamed(definition: str, commit: str, reader: int) -> Iterator[Record]:
    yield from _streamed(DataDefinition.model_validate_json(definition))


def _first_full(made: Iterable[Record]) -> Record | None:
    return next((record for record in made if any(record.values())), None)


def _hub_record(row: dict[str, Any], number: int, definition: DataDefinition, reader: int = READER) -> Record:
    try:
        return record_of(definition, row) or empty_record(definition)
    except ValueError as error:
        raise Unreadable(f"{definition.hub}, row {number + 1}: {error}") from None


def _without_empty(data: Dataset, definition: DataDefinition, name: str, key: str, say: Say | None) -> Dataset:
    """The records that have something to say."""
    column, more = COLUMNS[definition.kind][0], MORE in data.column_names
    blank = definition.kind == "text" and definition.join is None
    empty, bare = [np.zeros(0, bool)], more
    for batch in data.select_columns([column, MORE] if more else [column]).with_format("arrow").iter(batch_size=ROWS):
        empty.append(_empty(batch[column], blank).to_numpy(zero_copy_only=False))
        bare = bare and batch[MORE].null_count == len(batch)
    marks = np.concatenate(empty)
    count = int(marks.sum())
    if count:
        if say is not None and count < len(data):
            say(f"[data] {key}: {count:,} of {len(data):,} rows of {name} are empty and left out")
        data = data.select(np.flatnonzero(~marks))
    return data.remove_columns(MORE) if bare else data


def _empty(column: Any, blank: bool) -> Any:
    """By row of an Arrow column, whether it is null; with `blank`, also whether it is white space."""
    found = column.is_null()
    if blank:
        found = compute.or_(found, compute.fill_null(compute.equal(compute.utf8_trim_whitespace(column), ""), False))
    return found.combine_chunks() if hasattr(found, "combine_chunks") else found


def _cut(data: Dataset, definition: DataDefinition, name: str, key: str) -> Dataset:
    """The definition's part of rows that come without a split."""
    if definition.cut is None or not len(data):
        return data
    if len(data) < 2:
        raise RecipeError(
            key, f"{name} has {len(data)} row, which cannot be cut into two parts; give a file of several"
        )
    border = min(max(1, len(data) * 9 // 10), len(data) - 1)
    return data.select(range(border)) if definition.cut == "train" else data.select(range(border, len(data)))


def load_many(names: list[str], key: str, *, joined: bool = False, say: Say | None = None) -> Dataset:
    """Several datasets of one kind, one after the other. joined, say: as in `load_one`."""
    return join_kinds(names, [load_one(name, key, joined=joined, say=say) for name in names], key)


def join_kinds(names: list[str], parts: list[Dataset], key: str) -> Dataset:
    """Concatenate datasets.

    Raises:
        RecipeError: they are of different kinds: texts, conversations, prompts with completions.
    """
    if any(SYNTHETIC in part.column_names for part in parts):
        parts = [_marked(part, False) if {"text"} == set(part.column_names) else part for part in parts]
    if any(MORE in part.column_names for part in parts):
        parts = [part if MORE in part.column_names else _with_more(part) for part in parts]
    kinds = [_kind(part) for part in parts]
    if len(set(kinds)) > 1:
        listed = ", ".join(f"{name} has {kind}" for name, kind in zip(names, kinds, strict=True))
        raise RecipeError(key, f"datasets of different kinds cannot be joined: {listed}")
    return concatenate_datasets(parts)


def _with_more(data: Dataset) -> Dataset:
    return data.add_column(MORE, [None] * len(data), feature=Value("string"))


def _kind(data: Dataset) -> str:
    """What the rows of a dataset are, in words."""
    columns = set(data.column_names)
    turns = isinstance(data.features.get("prompt"), List)
    names = {"text": "text", "messages": "conversations", "problem": "problems"}
    found = next((words for name, words in names.items() if name in columns), None)
    return found or f"prompts with completions ({'conversations' if turns else 'text'})"
