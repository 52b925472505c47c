"""What can be said of a dataset before anything is loaded: its definition, its files, and row by row what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from transmla.data.definition import DataDefinition, find_definition, local_files
from transmla.data.hub_questions import check_columns, hub_columns
from transmla.data.reading import Unreadable, columns_of_file, format_of, mark_of
from transmla.data.records import records
from transmla.errors import RecipeError

LIMIT = 200_000_000  # bytes of a dataset, unpacked, that are looked at before it is loaded: a few seconds


@dataclass(frozen=True)
class Inspected:
    """What was seen of a dataset's files. rows: that have something to say. whole: whether everything was seen."""

    rows: int
    whole: bool


def check_dataset(name: str, key: str, *, online: bool, problems: bool = False) -> str:
    """Checks before anything is loaded: the definition, its files, their columns and rows, not empty.

    Args:
        online: ask the hub about a hub dataset (its columns, where it states them).
        problems: problems with answers are wanted, not text.

    Returns:
        what its rows are: `text`, `messages`, `completion` or `problems`.

    Raises:
        RecipeError: the first thing that is wrong, with file and row.
    """
    definition, folder = find_definition(name, key)
    if problems and "problem" not in definition.columns:
        raise RecipeError(key, f"{name} has no problems; its definition must name the columns problem and answer")
    if not problems and "problem" in definition.columns:
        raise RecipeError(
            key, f"{name} has problems, not text; have the teacher write for them (write: kind traces), name @NAME"
        )
    if definition.hub is not None and online and (columns := hub_columns(definition, key)) is not None:
        check_columns(definition, columns, name, key)
    inspect_files(definition, folder, key)
    return definition.kind


def inspect_files(definition: DataDefinition, folder: Path, key: str) -> Inspected:
    """Look at the rows of a local dataset; nothing is seen of a hub's.

    Raises:
        RecipeError: a file or row cannot be used, or there is none.
    """
    files = local_files(definition, folder, key)
    texts = [file for file in files if format_of(file) == "text"]
    if definition.separator is not None and definition.local is None and files and not texts:
        raise RecipeError(key, f"separator is for .txt files, and {files[0].name} is none; leave it out")
    try:
        for file in files:
            columns = columns_of_file(file)
            if columns is None:
                raise RecipeError(key, f"{file} is empty; name a file that has text")
            check_columns(definition, columns, str(file), key)
        found = _seen(definition.model_dump_json(exclude_unset=True), tuple(map(mark_of, files)))
    except Unreadable as error:
        raise RecipeError(key, str(error)) from None
    if files and not found.rows:
        raise RecipeError(key, f"{files[0]} has no row with text in it; name a file that has")
    return found


@lru_cache(maxsize=256)
def _seen(definition: str, files: tuple[tuple[str, int, int, int, int], ...]) -> Inspected:
    """The files of a definition, each seen once, however many lists name it."""
    settings = DataDefinition.model_validate_json(definition)
    unseen: list[Path] = []
    rows = sum(
        any(one.values())
        for _, one in records(settings, [Path(name) for name, *_ in files], limit=LIMIT, unseen=unseen)
    )
    return Inspected(rows, not unseen)
