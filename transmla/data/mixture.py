"""Mixtures of datasets: shares of tokens, length filters, and an order in which every prefix has the shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from transmla.data.documents import documents, token_counts
from transmla.data.loading import Say, join_kinds, load_many, load_one
from transmla.errors import RecipeError
from transmla.recipe.data_lists import Part


def load_mixture(
    entries: Sequence[str | Part],
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    joined: bool = False,
    say: Say | None = None,
) -> Dataset:
    """The datasets of a `data` list as one.

    Without weights they follow one another. With weights w, rows are drawn at random, without repeating one, until the
    first dataset is used up: dataset i has w_i T tokens, T = min_i tokens_i / w_i over those without `repeat`. Rows of
    a dataset with `repeat` come again in a new order where T asks for it; when all repeat, T is the least that uses
    every row. Each row is placed by the share of its dataset that precedes it, so that every prefix of the mixture has
    the weights, to within a row.

    Args:
        entries: names, or parts with filters and weights (transmla.recipe.data_lists.Part).
        key: recipe key, for errors.
        seed: of the order.
        joined: as in `load_one`, for plain names; rows that are counted stay apart.
        say: is told how many rows were empty and are left out.

    Raises:
        RecipeError: a dataset is missing, of another kind than the rest, or no row of it passes its filters.
    """
    if all(isinstance(entry, str) for entry in entries):
        return load_many([str(entry) for entry in entries], key, joined=joined, say=say)
    parts, lengths = [], []
    for entry in entries:
        if isinstance(entry, str):
            parts.append(load_one(entry, key, joined=joined, say=say))
            continue
        part, sizes = _filter(entry, load_one(entry.name, key, say=say), key, tokenizer)
        parts.append(part)
        lengths.append(sizes)
    whole = join_kinds([str(entry) for entry in entries], parts, key)
    weighed = [entry for entry in entries if isinstance(entry, Part) and entry.weight is not None]
    if not weighed:
        return whole
    return whole.select(mixture_order(weighed, lengths, seed))


def _filter(part: Part, data: Dataset, key: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, np.ndarray]:
    """The rows that pass and their lengths in tokens (empty where nothing asks for them)."""
    if part.weight is None and part.min_tokens is None and part.max_tokens is None:
        return data.select(range(min(part.rows or len(data), len(data)))), np.zeros(0, np.int64)
    if part.rows is not None:  # no more is tokenised than it takes to find them
        found = np.array(list(islice(passing(part, data, key, tokenizer), part.rows)))
        return data.select(found[:, 0]), found[:, 1]
    try:
        sizes = token_counts(data, tokenizer)
    except ValueError as error:
        raise RecipeError(key, f"{part.name}, {error}") from None
    low, high = _bounds(part)
    kept = np.flatnonzero((sizes >= low) & (sizes <= high))
    if not len(kept):
        raise _none_passes(part, key)
    return (data if len(kept) == len(data) else data.select(kept)), sizes[kept]


def _bounds(part: Part) -> tuple[int, float]:
    return part.min_tokens or 1, part.max_tokens or float("inf")


def _none_passes(part: Part, key: str) -> RecipeError:
    low, high = _bounds(part)
    return RecipeError(key, f"no row of {part.name} has {low} to {high} tokens; widen min_tokens and max_tokens")


def passing(part: Part, data: Dataset, key: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """The rows of a dataset that pass a part's filters, each with its length in tokens.

    Raises:
        RecipeError: none does, or the chat template refuses a row.
    """
    low, high = _bounds(part)
    found = False
    try:
        for index, document in enumerate(documents(data, tokenizer)):
            if low <= len(document) <= high:
                found = True
                yield index, len(document)
    except ValueError as error:
        raise RecipeError(key, f"{part.name}, {error}") from None
    if not found:
        raise _none_passes(part, key)


def mixture_order(parts: Sequence[Part], lengths: Sequence[ArrayLike], seed: int) -> np.ndarray:
    """Which rows of the concatenated parts make the mixture, in order (see `load_mixture`).

    Args:
        parts: with weights.
        lengths: tokens of every row, by part; none is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = [np.asarray(sizes, np.int64) for sizes in lengths]
    weights = [part.weight for part in parts if part.weight is not None]
    totals = [int(sizes.sum()) for sizes in tokens]
    reach = [(total / weight, part.repeat) for total, weight, part in zip(totals, weights, parts, strict=True)]
    once = [reached for reached, repeats in reach if not repeats]
    size = min(once) if once else max(reached for reached, _ in reach)
    places, found, start = [], [], 0
    for part, weight, sizes in zip(parts, weights, tokens, strict=True):
        target = weight * size
        rows = _choose_rows(sizes, target, part.repeat, generator)
        places.append((np.cumsum(sizes[rows]) - sizes[rows] / 2) / target)
        found.append(start + rows)
        start += len(sizes)
    whole = np.concatenate(found)
    return whole[np.lexsort((whole, np.concatenate(places)))]


def _choose_rows(sizes: np.ndarray, target: float, repeat: bool, generator: torch.Generator) -> np.ndarray:
    """Rows in random order whose tokens come nearest to `target`; at least one."""
    chosen: list[np.ndarray] = []
    have = 0
    while True:
        rows = torch.randperm(len(sizes), generator=generator).numpy()
        own = sizes[rows]
        ends = have + np.cumsum(own)
        beyond = ends - own / 2 > target
        beyond[0] = beyond[0] and bool(chosen)
        if beyond.any():
            return np.concatenate([*chosen, rows[: beyond.argmax()]])
        chosen.append(rows)
        have = int(ends[-1])
        if not repeat:
            return np.concatenate(chosen)
