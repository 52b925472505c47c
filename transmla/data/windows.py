"""Fixed windows of tokens for calibration and evaluation: the same text for every model that is compared."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def documents(data: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The documents of a dataset as token ids; conversations through the tokenizer's chat template."""
    for row in data:
        content = row["text"] if "text" in row else row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        if isinstance(content, str):
            yield tokenizer(content, verbose=False)["input_ids"]
        else:  # the template writes the special tokens itself
            text = tokenizer.apply_chat_template(content, tokenize=False)
            yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def token_windows(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int
) -> Tensor:
    """Concatenate documents, an end token after each, and cut them into windows.

    Args:
        tokens: budget; the last window that would pass it is left out.
        length: L, tokens a window.

    Returns:
        [n, L] token ids, n = tokens // L where the text is long enough.

    Raises:
        ValueError: the text does not fill one window.
    """
    wanted = max(1, tokens // length) * length
    stream: list[int] = []
    for document in documents(data, tokenizer):
        stream += document
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= wanted:
            break
    count = min(wanted, len(stream)) // length
    if count == 0:
        raise ValueError(f"the text has {len(stream)} tokens, fewer than one window of {length}; lower max_length")
    return torch.tensor(stream[: count * length]).view(count, length)
