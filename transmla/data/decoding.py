"""Steps of one token a row on buffers of fixed size, which a CUDA graph replays.

A step of a small model is a thousand short kernels, and launching them one by one takes longer than running them (some 100 ms
a step for 30 layers, docs/recovery.md). A graph launches all of them at once, but replays the same sizes
at the same addresses: hence buffers, in segments. Between two segments rows that are done leave and buffers grow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from transmla.modeling.backends import ONE_QUERY

# Steps of one graph; capturing one costs some ten steps, and every step reads the whole buffer. Like the batch it is part of
# what a seed means: rows that leave change which random numbers the others get.
SEGMENT = 192


def has_fixed_size(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether the model may decode so: layers that see everything, attention that transformers lets us choose, one device,
    and no experts, whose tokens are counted on the CPU."""
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    experts = any(name.endswith("experts") for name, _ in model.named_modules())
    split = len({parameter.device for parameter in model.parameters()}) > 1
    return plain and not capped and not experts and not split and model._supports_attention_backend


class Buffers(Cache):
    """Keys and values [B, G, S, E] of which `column` [1], on the device, is the next to be written."""

    def __init__(self, filled: DynamicCache) -> None:
        super().__init__(layers=filled.layers)
        first = filled.layers[0].keys
        self.column = torch.full((1,), first.shape[2], device=first.device)

    def rearrange(self, rows: Tensor | None, length: int) -> None:
        """Keep these rows (None: all), with room for `length` columns; layer by layer, so that one is there twice at most."""
        for layer in self.layers:
            layer.keys, layer.values = (_resized(states, rows, length) for states in (layer.keys, layer.values))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object):
        """Write one column; the whole buffers are returned, the mask hides what is not written yet."""
        layer = self.layers[layer_idx]
        layer.keys.index_copy_(2, self.column, key_states)
        layer.values.index_copy_(2, self.column, value_states)
        return layer.keys, layer.values


def _resized(states: Tensor, rows: Tensor | None, length: int) -> Tensor:
    kept = states if rows is None else states[rows]
    return F.pad(kept[:, :, :length], (0, 0, 0, max(0, length - kept.shape[2])))


class Decoder:
    """Continues rows whose prompts are in a cache.

    Args:
        model: with `cache` from its prompts, all of one padded length.
        mask: [B, T], which of the cache's columns a row may see.
        tokens, positions: [B], the first token after the prompt, not in the cache yet, and its position.
        choose: from logits [B, V] to tokens [B]; nothing in it may wait for the device.
        ends: tokens that end a row.
        generator: what `choose` draws from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        mask: Tensor,
        tokens: Tensor,
        positions: Tensor,
        choose: Callable[[Tensor], Tensor],
        ends: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.model, self.choose, self.ends, self.generator = model, choose, ends, generator
        self.buffers = Buffers(cache)
        self.filled = mask.shape[1]
        hidden = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(mask == 0, -torch.inf)
        self.mask = hidden[:, None, None]
        self.tokens, self.positions = tokens[:, None].clone(), positions[:, None].clone()
        self.done = (tokens[:, None] == ends).any(1)
        self.rows = torch.arange(len(tokens), device=tokens.device)

    @torch.no_grad()
    def run(self, steps: int) -> Tensor:
        """[B, steps] tokens, -1 after a row's last step; those after an end token mean nothing."""
        written = torch.full((len(self.tokens), steps), -1, device=self.tokens.device)
        before = self.model.config._attn_implementation
        self.model.config._attn_implementation = ONE_QUERY
        try:
            for start in range(0, steps, SEGMENT):
                count = min(SEGMENT, steps - start)
                left = (~self.done).nonzero()[:, 0]
                if not len(left):
                    break
                self._keep(left, count)
                written[self.rows, start : start + count] = self._segment(count)
        finally:
            self.model.config._attn_implementation = before
        return written

    def _keep(self, left: Tensor, count: int) -> None:
        rows = None if len(left) == len(self.done) else left
        self.buffers.rearrange(rows, self.filled + count)
        if rows is not None:
            self.mask, self.tokens, self.positions = self.mask[rows], self.tokens[rows], self.positions[rows]
            self.done, self.rows = self.done[rows], self.rows[rows]
        self.mask = F.pad(self.mask, (0, count), value=-torch.inf)
        self.filled += count

    def _segment(self, count: int) -> Tensor:
        self.chunk = torch.full((len(self.tokens), count), -1, device=self.tokens.device)
        self.place = torch.zeros(1, dtype=torch.long, device=self.tokens.device)
        if not self.tokens.is_cuda:
            for _ in range(count):
                self._step()
            return self.chunk
        with torch.cuda.device(self.tokens.device):
            return self._replayed(count)

    def _replayed(self, count: int) -> Tensor:
        stream = torch.cuda.Stream()  # the first step prepares, on a stream of its own, what a capture must not
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        if count > 1:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):
                self._step()
            for _ in range(count - 1):
                graph.replay()
            torch.cuda.synchronize()  # the graph's memory goes with it
        return self.chunk

    def _step(self) -> None:
        """One token for every row; all that changes, changes in place."""
        self.mask.index_fill_(3, self.buffers.column, 0.0)
        logits = self.model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.buffers,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = self.choose(logits)
        self.chunk.index_copy_(1, self.place, chosen[:, None])
        self.done |= (chosen[:, None] == self.ends).any(1)
        self.tokens.copy_(chosen[:, None])
        for counter in (self.positions, self.buffers.column, self.place):
            counter += 1
