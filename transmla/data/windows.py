"""Fixed windows of tokens for calibration and evaluation: the same text for every model that is compared."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.data.sources import load_many
from transmla.errors import RecipeError

POOL = 16  # text that random windows are drawn from, in budgets


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
    data: Dataset, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int, seed: int | None = None
) -> Tensor:
    """Concatenate documents, an end token after each, and cut them into windows.

    Args:
        tokens: budget; the last window that would pass it is left out.
        length: L, tokens a window.
        seed: take windows at random from `POOL` times as much text, instead of the first ones.

    Returns:
        [n, L] token ids, n = tokens // L where the text is long enough.

    Raises:
        ValueError: the text does not fill one window.
    """
    wanted = max(1, tokens // length) * length
    available = wanted if seed is None else POOL * wanted
    stream: list[int] = []
    for document in documents(data, tokenizer):
        stream += document
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= available:
            break
    count = min(available, len(stream)) // length
    if count == 0:
        raise ValueError(f"the text has {len(stream)} tokens, fewer than one window of {length}; lower max_length")
    windows = torch.tensor(stream[: count * length]).view(count, length)
    if seed is None:
        return windows
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: wanted // length]
    return windows[chosen.sort().values]


def named_windows(
    names: list[str],
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int | None = None,
) -> Tensor:
    """`token_windows` of datasets that a recipe's section `key` names. [n, L].

    Raises:
        RecipeError: a dataset is missing or too short; names `key`.
    """
    try:
        return token_windows(
            load_many(names, f"{key}.data", joined=True), tokenizer, tokens=tokens, length=length, seed=seed
        )
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{key}.data", str(error)) from None
