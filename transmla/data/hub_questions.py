"""What the hub is asked about a dataset, and how its errors are told.

Datasets is imported when the hub is asked: it takes half a second that files of one's own need not wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transmla.data.definition import DataDefinition
from transmla.errors import RecipeError


def hub_columns(definition: DataDefinition, key: str) -> set[str] | None:
    """The columns of a hub dataset, where the hub states them.

    Raises:
        RecipeError: the hub does not have it, or cannot be asked.
    """
    from datasets import load_dataset_builder

    with hub_errors(definition, key):
        features = load_dataset_builder(**hub_arguments(definition)).info.features
    return None if features is None else set(features)


def check_columns(definition: DataDefinition, columns: set[str], where: str, key: str) -> None:
    """Refuse a file or dataset that lacks a column which the definition names.

    Raises:
        RecipeError: with the columns that are there.
    """
    for column in definition.needed_columns():
        if column not in columns:
            there = ", ".join(sorted(map(str, columns)))
            raise RecipeError(key, f"{where} has no column {column!r}; it has: {there[:200]}; correct the definition")


def hub_arguments(definition: DataDefinition) -> dict[str, Any]:
    """What names a hub dataset in `datasets`. Only data files are read: code of a repository is never run."""
    files = None if definition.files is None else {definition.split: definition.files}
    return {
        "path": definition.hub,
        "name": definition.subset,
        "revision": definition.revision,
        "data_files": files,
    }


@contextmanager
def hub_errors(definition: DataDefinition, key: str) -> Iterator[None]:
    """Turns an error of the hub into one of a recipe."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except RecipeError:
        raise
    except (OSError, ValueError, DatasetsError) as error:  # datasets' and the hub's errors derive from these
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise RecipeError(key, f"cannot load {definition.hub}: {reason}; correct the definition") from None
