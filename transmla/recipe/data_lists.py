"""What a recipe's `data` lists hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from transmla.recipe.base import Section
from transmla.recipe.bounds import Count, Number
from transmla.recipe.folder_name import PathText


class Part(Section):
    """A dataset with its filters and its share of a mixture (transmla.data.mixture).

    weight: share of the mixture's tokens, relative to the other parts' weights.
    min_tokens, max_tokens: rows (documents, conversations) of another length are left out.
    rows: only the first so many of the rows that pass.
    repeat: rows may come more than once where the others' weights ask for more than there is.
    """

    name: PathText
    weight: Annotated[Number, Field(ge=1e-9, le=1e9)] | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    rows: Count | None = None
    repeat: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Part:
        if self.repeat and self.weight is None:
            raise ValueError("repeat is for a part of a mixture; give it a weight")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}; no row can pass")
        return self

    def __str__(self) -> str:
        return self.name if self.weight is None else f"{self.name} (weight {self.weight:g})"


def _all_weights_or_none(data: list[str | Part]) -> list[str | Part]:
    missing = [str(entry) for entry in data if isinstance(entry, str) or entry.weight is None]
    if missing and len(missing) < len(data):
        raise ValueError(f"give every dataset of a mixture a weight, or none; {', '.join(missing)} has none")
    return data


# A dataset's name, or a mapping; the tags keep an error of one branch from being reported as two.
_Entry = Annotated[
    Annotated[PathText, Tag("dataset name")] | Annotated[Part, Tag("part")],
    Discriminator(lambda value: "dataset name" if isinstance(value, str) else "part"),
]

DataList = Annotated[list[_Entry], AfterValidator(_all_weights_or_none)]


def data_names(data: Sequence[str | Part]) -> list[str]:
    """The names of the datasets in a `data` list."""
    return [entry if isinstance(entry, str) else entry.name for entry in data]
