"""Tokens a second that models write behind prompts of several lengths, through the project's own sampler."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.generate.sampler import ModelSampler

ON_A_GPU = ((32, 1024, 128), (32, 8192, 256), (1, 8192, 128))  # rows, tokens of a prompt, tokens written
ELSEWHERE = ((1, 64, 16),)
FEW = 2  # tokens of the run that is taken off: it reads the prompts, and on a GPU records a graph

Row = dict[str, Any]


def decoding_rows(models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """One row a shape: tokens a second of every model by its name, None where it could not be measured: mostly, where
    it does not fit into memory.

    Prompts are random tokens, and no token ends a text. Reading the prompts is not counted.
    """
    some = next(iter(models.values()))
    for rows, length, written in ON_A_GPU if some.device.type == "cuda" else ELSEWHERE:
        if length + written > getattr(some.config, "max_position_embeddings", length + written):
            continue
        rates = {name: _rate(model, tokenizer, rows, length, written) for name, model in models.items()}
        yield {"shape": f"{rows} x {length:,}", "written": written, "tokens a second": rates}


def _rate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, length: int, written: int
) -> float | None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (rows, length), generator=generator).tolist()
    sampler = ModelSampler(model, tokenizer)
    sampler.ends = sampler.ends[:0]

    def seconds(count: int) -> float:
        settings: Any = SimpleNamespace(temperature=1.0, top_p=1.0, max_new_tokens=count)
        begun = time.monotonic()
        sampler(prompts, settings, 0)  # returns lists: nothing is left to wait for
        return time.monotonic() - begun

    try:
        seconds(FEW)  # warms up
        few = seconds(FEW)
        rest = seconds(written) - few
        return rows * (written - FEW) / rest if rest > 0 else None  # a few steps of a tiny model are within the noise
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        sampler.decoder = None
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
