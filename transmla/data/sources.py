"""Datasets by definition file: a hub id or local files, columns, template, licence. See `data/*.yaml`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Formatter
from typing import Literal

import yaml
from datasets import Dataset, concatenate_datasets, load_dataset, load_dataset_builder
from pydantic import ValidationError, model_validator

from transmla.compose import share
from transmla.errors import RecipeError
from transmla.recipe import Section

FORMATS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
# What trl's trainers know: language modeling, conversations, prompt with completion.
ROLES = ({"text"}, {"messages"}, {"prompt", "completion"})


class DataDefinition(Section):
    """One dataset.

    hub or path: where it is; a relative path is relative to the definition file. `path` may be a glob.
    columns: which of the file's columns is `text`, `messages`, or `prompt` and `completion`.
    template: a Python format string over the file's columns that makes `text`, instead of columns.
    separator: for `.txt` files, what stands between two documents.
    """

    hub: str | None = None
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[Literal["text", "messages", "prompt", "completion"], str] = {}
    template: str | None = None
    separator: str | None = None
    licence: str = "unknown"
    about: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> DataDefinition:
        if (self.hub is None) == (self.path is None):
            raise ValueError("give exactly one of hub and path")
        if self.template is None and set(self.columns) not in ROLES:
            raise ValueError("columns must name text, or messages, or prompt and completion (or give a template)")
        return self


def find_definition(name: str, key: str) -> tuple[DataDefinition, Path]:
    """The definition called `name` and the folder its paths are relative to.

    Args:
        name: a shipped definition, or the path of a `.yaml` definition, or of a `.jsonl`, `.parquet` or `.txt` file
            with a `text` column.
        key: recipe key, for errors.
    """
    path = Path(name)
    if path.suffix in FORMATS:
        return DataDefinition(path=str(path.resolve()), columns={"text": "text"}), Path.cwd()
    file = path if path.suffix in (".yaml", ".yml") else share("data") / f"{name}.yaml"
    if not file.is_file():
        known = sorted(item.stem for item in share("data").glob("*.yaml"))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else f"; there are: {', '.join(known)}"
        raise RecipeError(key, f"no dataset {name!r}{hint}")
    try:
        return DataDefinition.model_validate(yaml.safe_load(file.read_text()) or {}), file.parent
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(key, f"{file}: {where} {first['msg'].removeprefix('Value error, ')}") from None


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
    if any(file.suffix not in FORMATS for file in files):
        raise RecipeError(key, f"{path}: unknown format; use one of {', '.join(FORMATS)}")
    return files


def check_dataset(name: str, key: str, *, online: bool) -> None:
    """Cheap checks before anything is loaded: the definition, its files, the columns of the first row, not empty.

    Args:
        online: ask the hub about a hub dataset (its columns, where it states them).
    """
    definition, folder = find_definition(name, key)
    if definition.hub is not None and online:
        with _hub_errors(definition, key):
            features = load_dataset_builder(definition.hub, definition.subset, revision=definition.revision).info.features
        if features is not None:
            _check_columns(definition, set(features), name, key)
    for file in local_files(definition, folder, key):
        columns = _first_row(file, key)
        if columns is None:
            raise RecipeError(key, f"{file} is empty; name a file that has text")
        _check_columns(definition, columns, str(file), key)


def _check_columns(definition: DataDefinition, columns: set[str], where: str, key: str) -> None:
    fields = [] if definition.template is None else [name for _, name, _, _ in Formatter().parse(definition.template)]
    for column in [*definition.columns.values(), *(field for field in fields if field)]:
        if column not in columns:
            raise RecipeError(key, f"{where} has no column {column!r}; it has: {', '.join(sorted(columns))}")


@contextmanager
def _hub_errors(definition: DataDefinition, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # datasets' and the hub's errors derive from these
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(key, f"cannot load {definition.hub}: {reason}; correct the definition") from None


def _first_row(file: Path, key: str) -> set[str] | None:
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet

        table = parquet.ParquetFile(file)
        return set(table.schema_arrow.names) if table.metadata.num_rows else None
    with file.open(encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), None)
    if first is None:
        return None
    if file.suffix == ".txt":
        return {"text"}
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise RecipeError(key, f"{file}: the first line is no JSON object; write one object a line")
    return set(row)


def load_one(name: str, key: str) -> Dataset:
    """Load a dataset with the columns that trl's trainers expect: text, messages, or prompt and completion.

    Raises:
        RecipeError: missing, empty, or without a column that the definition names.
    """
    definition, folder = find_definition(name, key)
    files = local_files(definition, folder, key)
    if definition.hub is not None:
        with _hub_errors(definition, key):
            data = load_dataset(
                definition.hub, definition.subset, split=definition.split, revision=definition.revision
            )
    elif files[0].suffix == ".txt":
        texts = [file.read_text(encoding="utf-8") for file in files]
        documents = [part for text in texts for part in (text.split(definition.separator) if definition.separator else [text])]
        data = Dataset.from_dict({"text": [document.strip() for document in documents if document.strip()]})
    else:
        data = load_dataset(FORMATS[files[0].suffix], data_files=[str(file) for file in files], split="train")
    _check_columns(definition, set(data.column_names), name, key)
    if definition.template is not None:
        template = definition.template
        data = data.map(lambda row: {"text": template.format(**row)}, remove_columns=data.column_names)
    else:
        data = data.select_columns(list(definition.columns.values()))
        data = data.rename_columns({old: new for new, old in definition.columns.items() if old != new})
    if not len(data):
        raise RecipeError(key, f"{name} is empty; name a dataset that has text")
    return data


def load_many(names: list[str], key: str) -> Dataset:
    """Several datasets of one kind, one after the other."""
    parts = [load_one(name, key) for name in names]
    columns = [tuple(sorted(part.column_names)) for part in parts]
    if len(set(columns)) > 1:
        raise RecipeError(key, f"datasets of different kinds cannot be joined: {dict(zip(names, columns, strict=True))}")
    return concatenate_datasets(parts)
