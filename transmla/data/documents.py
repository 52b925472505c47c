"""The documents of a dataset as token ids."""

from __future__ import annotations

from collections.abc import Iterator

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

ROWS = 256  # that a tokenizer gets at a time, so that it may use all cores


def documents(data: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The documents of a dataset as token ids; conversations through the tokenizer's chat template."""
    for start in range(0, len(data), ROWS):
        contents = [_content(row) for row in data.select(range(start, min(start + ROWS, len(data))))]
        plain = [isinstance(content, str) for content in contents]
        # A chat template writes the special tokens itself.
        texts = [
            content if isinstance(content, str) else str(tokenizer.apply_chat_template(content, tokenize=False))
            for content in contents
        ]
        found = {
            special: iter(
                _token_ids([text for text, own in zip(texts, plain, strict=True) if own == special], special, tokenizer)
            )
            for special in (True, False)
        }
        for special in plain:
            yield next(found[special])


def _content(row: dict) -> str | list[dict]:
    return row["text"] if "text" in row else row["messages"] if "messages" in row else row["prompt"] + row["completion"]


def _token_ids(texts: list[str], special: bool, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []
