"""Fixed windows of tokens for calibration and evaluation: the same text for every model that is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.data.documents import documents
from transmla.data.loading import Say
from transmla.data.mixture import load_mixture
from transmla.errors import RecipeError
from transmla.recipe.data_lists import Part

POOL = 16  # text that random windows are drawn from, in budgets


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
    for document in documents(data, tokenizer, ended=True):
        stream += document
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
    names: Sequence[str | Part],
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int | None = None,
    mixing_seed: int = 0,
    say: Say | None = None,
) -> Tensor:
    """`token_windows` of datasets that a recipe's section `key` names. [n, L]. mixing_seed: of a mixture, where there
    is one. say: as in `load_mixture`.

    Raises:
        RecipeError: a dataset is missing or too short; names `key`.
    """
    try:
        data = load_mixture(names, f"{key}.data", tokenizer, mixing_seed, joined=True, say=say)
        return token_windows(data, tokenizer, tokens=tokens, length=length, seed=seed)
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{key}.data", str(error)) from None
