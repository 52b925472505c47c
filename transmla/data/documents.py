"""The documents of a dataset as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from transmla.data.conversations import tools_of, unpack
from transmla.data.rendering import Template

ROWS = 256  # that a tokenizer gets at a time, so that it may use all cores
FIRST = 8  # of them at first: who asks for a few documents does not wait for hundreds


@dataclass(frozen=True)
class _Content:
    """The text of a row. plain: the tokenizer adds its special tokens; a chat template has written them itself."""

    text: str
    plain: bool


def documents(data: Dataset, tokenizer: PreTrainedTokenizerBase, *, ended: bool = False) -> Iterator[list[int]]:
    """The documents of a dataset as token ids; conversations through the tokenizer's chat template, nothing left out.

    Args:
        ended: with exactly one end token after each, where the tokenizer has one, whether it stood in the text, came
            from the chat template or is added here; else without one that the tokenizer would add by itself.

    Raises:
        ValueError: the template refuses a conversation, or leaves a part of it out; names the row.
    """
    template = Template(tokenizer)
    start, count = 0, FIRST
    while start < len(data):
        rows = _rows(data[start : start + count])
        contents = [_content(row, template, start + number) for number, row in enumerate(rows, 1)]
        for content, ids in zip(contents, _ids(contents, tokenizer), strict=True):
            yield _with_end(ids, content, tokenizer) if ended else ids
        start, count = start + count, min(2 * count, ROWS)


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What `documents` gives of a dataset of these texts."""
    return list(_ids([_Content(text, True) for text in texts], tokenizer))


def token_counts(data: Dataset, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The lengths of `documents` in tokens, [rows]. Datasets keeps them on disk: text is tokenised for them once.

    Raises:
        ValueError: as `documents`.
    """
    counted = data.map(
        _count,
        batched=True,
        batch_size=ROWS,
        with_indices=True,
        remove_columns=data.column_names,
        features=Features({"tokens": Value("int64")}),
        fn_kwargs={"tokenizer": tokenizer},
        desc="Counting tokens",
    )
    return np.asarray(counted.with_format("numpy")["tokens"][:])


def _count(rows: dict[str, list], numbers: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    template = Template(tokenizer)
    contents = [_content(row, template, number + 1) for row, number in zip(_rows(rows), numbers, strict=True)]
    return {"tokens": [len(ids) for ids in _ids(contents, tokenizer)]}


def _rows(columns: dict[str, list]) -> list[dict]:
    """Rows of columns: datasets is many times faster with a few hundred rows at once than with one after another."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _ids(contents: list[_Content], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids without an end token that the tokenizer adds by itself."""
    own = adds_end(tokenizer)
    found = {
        plain: iter(_token_ids([one.text for one in contents if one.plain == plain], plain, tokenizer))
        for plain in (True, False)
    }
    for content in contents:
        ids = next(found[content.plain])
        yield ids[:-1] if content.plain and own and ids[-1:] == [tokenizer.eos_token_id] else ids


def adds_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts an end token after a text by itself."""
    end = tokenizer.eos_token_id
    return end is not None and _token_ids(["a"], True, tokenizer)[0][-1:] == [end]


def one_end(ids: list[int], end: int | None) -> list[int]:
    """Token ids without the end tokens that follow a first one at the end."""
    while end is not None and ids[-2:] == [end, end]:
        ids = ids[:-1]
    return ids


def _with_end(ids: list[int], content: _Content, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    if end is None:
        return ids
    if not content.plain and end in ids[-4:]:  # a template may write a line break behind its end token
        after = len(ids) - ids[::-1].index(end)
        if after == len(ids) or not str(tokenizer.decode(ids[after:])).strip():
            return ids
    return one_end([*ids, end], end)


def _content(row: dict, template: Template, number: int) -> _Content:
    if "text" in row:
        return _Content(row["text"], True)
    if isinstance(row.get("prompt"), str):
        return _Content(row["prompt"] + row["completion"], True)
    try:
        turns = unpack(row, "messages") if "messages" in row else unpack(row, "prompt") + unpack(row, "completion")
        return _Content(template.render(turns, tools_of(row)).text, False)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None


def _token_ids(texts: list[str], special: bool, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []
