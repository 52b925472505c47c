"""Whether a source's weights are numbers that can be computed with: read from its files before the model is built."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.sources.weight_files import AGAIN, listed, weight_files

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def check_numbers(folder: Path, config: PretrainedConfig, dtype: torch.dtype, key: str) -> None:
    """Check every weight of a directory. dtype: what they will be stored in. key: for errors.

    Raises:
        RecipeError: a weight is NaN, infinite or above the largest number of `dtype`; a matrix is nothing but zeros;
            head and embedding differ where the configuration says that they are one.
    """
    most = torch.finfo(dtype).max
    infinite, empty = [], []
    for file in weight_files(folder, key):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it has no iterator
                value = stored.get_tensor(name)
                if not value.numel():
                    continue
                low, high = extremes(value)
                if not -most <= low <= high <= most:  # NaN is in no order
                    infinite.append(name)
                elif value.ndim > 1 and low == high == 0:
                    empty.append(name)
    if infinite:
        what = f"NaN, infinite or too large for {str(dtype).removeprefix('torch.')}"
        raise RecipeError(key, f"{listed(infinite)} of {folder} hold values that are {what}; {AGAIN}")
    if empty:
        raise RecipeError(key, f"{listed(empty)} of {folder} hold nothing but zeros; {AGAIN}")
    check_tied(folder, config, key)


def extremes(value: Tensor) -> tuple[float, float]:
    """The least and the largest number of a tensor that has some; NaN both if it holds one. One pass without copies:
    on a CPU `isfinite` and `any` take twenty times as long."""
    low, high = value.aminmax()
    return float(low), float(high)


def check_tied(folder: Path, config: PretrainedConfig, key: str) -> None:
    """Compare head and embedding where the configuration says that they are one. key: for errors.

    Raises:
        RecipeError: both are stored, and they differ.
    """
    if not config.tie_word_embeddings:
        return
    pair: dict[str, Tensor] = {}
    for file in weight_files(folder, key):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it has no iterator
                if name.endswith((EMBEDDING, HEAD)):
                    pair[HEAD if name.endswith(HEAD) else EMBEDDING] = stored.get_tensor(name)
    if len(pair) == 2 and not torch.equal(pair[HEAD], pair[EMBEDDING]):
        raise RecipeError(
            key,
            f"{folder} has a head that differs from the embedding, and its config.json says that they are one; set "
            "tie_word_embeddings to false there",
        )
