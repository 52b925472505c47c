"""Mixtures of datasets: shares of tokens, length filters, and an order in which every prefix has the shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from transmla.data.documents import documents
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


def _filter(part: Part, data: Dataset, key: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, list[int]]:
    """The rows that pass and their lengths in tokens (empty where nothing asks for them)."""
    if part.weight is None and part.min_tokens is None and part.max_tokens is None:
        return data.select(range(min(part.rows or len(data), len(data)))), []
    kept, sizes = [], []
    for index, size in passing(part, data, key, tokenizer):
        kept.append(index)
        sizes.append(size)
        if len(kept) == part.rows:
            break
    return data.select(kept), sizes


def passing(part: Part, data: Dataset, key: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """The rows of a dataset that pass a part's filters, each with its length in tokens.

    Raises:
        RecipeError: none does, or the chat template refuses a row.
    """
    low, high = part.min_tokens or 1, part.max_tokens or float("inf")
    found = False
    try:
        for index, document in enumerate(documents(data, tokenizer)):
            if low <= len(document) <= high:
                found = True
                yield index, len(document)
    except ValueError as error:
        raise RecipeError(key, f"{part.name}, {error}") from None
    if not found:
        raise RecipeError(key, f"no row of {part.name} has {low} to {high} tokens; widen min_tokens and max_tokens")


def mixture_order(parts: Sequence[Part], lengths: Sequence[Sequence[int]], seed: int) -> list[int]:
    """Which rows of the concatenated parts make the mixture, in order (see `load_mixture`).

    Args:
        parts: with weights.
        lengths: tokens of every row, by part; none is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = [sum(sizes) for sizes in lengths]
    weights = [part.weight for part in parts if part.weight is not None]
    reach = [(total / weight, part.repeat) for total, weight, part in zip(totals, weights, parts, strict=True)]
    once = [tokens for tokens, repeats in reach if not repeats]
    size = min(once) if once else max(tokens for tokens, _ in reach)
    placed: list[tuple[float, int]] = []
    start = 0
    for part, weight, sizes in zip(parts, weights, lengths, strict=True):
        target = weight * size
        rows = _choose_rows(sizes, target, part.repeat, generator)
        ends = accumulate(sizes[row] for row in rows)
        placed += [((end - sizes[row] / 2) / target, start + row) for row, end in zip(rows, ends, strict=True)]
        start += len(sizes)
    return [row for _, row in sorted(placed)]


def _choose_rows(sizes: Sequence[int], target: float, repeat: bool, generator: torch.Generator) -> list[int]:
    """Rows in random order whose tokens come nearest to `target`; at least one."""
    rows: list[int] = []
    have = 0
    while True:
        for row in torch.randperm(len(sizes), generator=generator).tolist():
            if rows and have + sizes[row] / 2 > target:
                return rows
            rows.append(row)
            have += sizes[row]
        if not repeat:
            return rows
