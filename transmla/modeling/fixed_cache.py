"""A cache of fixed size, whose columns are written in place: what a CUDA graph can replay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from transmla.modeling.determinism import written_once


class Buffers(Cache):
    """Keys and values [B, G, S, E] of which `column` [1], on the device, is the next to be written."""

    layers: list[Any]  # each a filled DynamicLayer; transformers' type allows for layers without keys

    def __init__(self, filled: DynamicCache, length: int) -> None:
        """Those of `filled`, which are taken out of it, with room for `length` columns."""
        super().__init__(layers=filled.layers)
        self.column = torch.full((1,), self.layers[0].keys.shape[2], device=self.layers[0].keys.device)
        self.rearrange(None, length)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        keys = self.layers[0].keys
        return keys.shape[0], keys.shape[2]

    def rearrange(self, rows: Tensor | None, length: int) -> None:
        """Keep these rows (None: all), with room for `length` columns; layer by layer, so that one is there twice at
        most."""
        for layer in self.layers:
            layer.keys, layer.values = (_resized(states, rows, length) for states in (layer.keys, layer.values))

    def refill(self, filled: DynamicCache) -> None:
        """Start again in place from another cache, which is used up. Later columns become zero: a mask hides all but
        NaN."""
        filled_layers: list[Any] = [*filled.layers]
        self.column.fill_(filled_layers[0].keys.shape[2])
        for layer, new in zip(self.layers, filled_layers, strict=True):
            for old, states in ((layer.keys, new.keys), (layer.values, new.values)):
                old[:, :, : states.shape[2]] = states
                old[:, :, states.shape[2] :] = 0
            new.keys = new.values = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one column; the whole buffers are returned, the mask hides what is not written yet."""
        layer = self.layers[layer_idx]
        with written_once():
            layer.keys.index_copy_(2, self.column, key_states)
            layer.values.index_copy_(2, self.column, value_states)
        return layer.keys, layer.values


def _resized(states: Tensor, rows: Tensor | None, length: int) -> Tensor:
    kept = states if rows is None else states[rows]
    return F.pad(kept[:, :, :length], (0, 0, 0, max(0, length - kept.shape[2])))
