"""Reading prompts into a cache: what comes before the first token that is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from transmla.families import FAMILIES
from transmla.modeling.attention import MLAAttention
from transmla.modeling.kernels.packed import PACKED, boundaries, needs_mask, plan_of, trunk_arguments

LONG = 1024  # tokens of a prompt from which padding is left out instead of masked
READ = 65536  # tokens of prompts that are read at a time: an MLP's activations of all would fill a card


def next_logits(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """Read tokens [B, T] into a cache; the logits behind them [B, V]. mask: [B, columns of the cache], or None."""
    return model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def read_padded(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """Read prompts into an empty cache, long ones a few rows at a time; the logits behind them [B, V].

    Args:
        tokens, positions: [B, T], prompts padded on the left. mask: [B, T], or None where nothing is padded.
    """
    rows = max(1, READ // tokens.shape[1])
    if rows >= len(tokens) or not _is_plain(cache):
        return next_logits(model, tokens, mask, positions, cache)
    pieces, logits = [], []
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        pieces.append(DynamicCache(config=model.config))
        own = None if mask is None else mask[part]
        logits.append(next_logits(model, tokens[part], own, positions[part], pieces[-1]))
    _join(pieces, cache)
    return torch.cat(logits)


def packs(model: PreTrainedModel, longest: int, cache: DynamicCache) -> bool:
    """Whether prompts of different lengths, at most `longest`, are read as packed documents (`read_packed`): where a
    mask would be large. Thousands of short ones are read faster with one (docs/experiments.md).

    A CPU computes documents one after the other, which many short prompts would make slow. Models of other families
    may not hand boundaries on to their attentions.
    """
    known = model.config.model_type in FAMILIES or any(isinstance(module, MLAAttention) for module in model.modules())
    if model.device.type != "cuda" or longest < LONG or not known or not _is_plain(cache):
        return False
    return needs_mask(model.config, longest, model.dtype, model.device) is None


def read_packed(model: PreTrainedModel, prompts: Sequence[list[int]], cache: DynamicCache) -> Tensor:
    """As `read_padded`, without padding: no tensor of tokens x tokens masks it, and nothing is computed for it. The
    cache is padded on the left, with zeros."""
    longest = max(map(len, prompts))
    pieces, logits, start = [], [], 0
    while start < len(prompts):
        stop, total = start + 1, len(prompts[start])
        while stop < len(prompts) and total + len(prompts[stop]) <= READ:
            stop, total = stop + 1, total + len(prompts[stop])
        piece, read = _read_documents(model, prompts[start:stop], longest)
        pieces.append(piece)
        logits.append(read)
        start = stop
    _join(pieces, cache)
    return torch.cat(logits)


def _read_documents(model: PreTrainedModel, prompts: Sequence[list[int]], longest: int) -> tuple[DynamicCache, Tensor]:
    """A padded cache of some prompts [n, G, longest, E], and the logits behind them [n, V]."""
    device, config = model.device, model.config
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    bounds = boundaries(positions[None])
    cache = DynamicCache(config=config)
    before, config._attn_implementation = config._attn_implementation, PACKED
    try:
        logits = model(
            input_ids=torch.tensor([[token for prompt in prompts for token in prompt]], device=device),
            position_ids=positions[None].to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=(bounds[1:] - 1).to(device),
            **trunk_arguments(bounds.to(device), plan_of(bounds)),
        ).logits[0]
    finally:
        config._attn_implementation = before
    lengths = bounds.diff()
    rows = torch.arange(len(prompts)).repeat_interleave(lengths).to(device)
    columns = (positions + longest - lengths.repeat_interleave(lengths)).to(device)

    def padded(states: Tensor) -> Tensor:
        """[1, G, T, E] -> [n, G, longest, E]."""
        filled = states.new_zeros(len(prompts), longest, states.shape[1], states.shape[3])
        filled[rows, columns] = states[0].transpose(0, 1)
        return filled.transpose(1, 2)

    layers: list[Any] = [*cache.layers]
    for layer in layers:
        layer.keys, layer.values = padded(layer.keys), padded(layer.values)
    return cache, logits


def _is_plain(cache: DynamicCache) -> bool:
    """Whether every layer keeps all it is given, as it is given."""
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _join(pieces: list[DynamicCache], cache: DynamicCache) -> None:
    """Put the rows of some caches, which are used up, into an empty one."""
    for index in range(len(cache.layers)):
        layers: list[Any] = [piece.layers[index] for piece in pieces]
        cache.update(torch.cat([one.keys for one in layers]), torch.cat([one.values for one in layers]), index)
        for layer in layers:
            layer.keys = layer.values = None
