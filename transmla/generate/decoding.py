"""Steps of one token per row on buffers of fixed size, which a CUDA graph replays.

A step of a small model is a thousand short kernels, and launching them one by one takes longer than running them (some
100 ms for 30 layers, docs/recovery.md). A graph launches all of them at once, but replays the same sizes at the
same addresses: hence buffers. What is short is written in one segment, whose buffers and graph serve the next batches
too; what is long in several, between which rows that are done leave and buffers grow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from transmla.modeling.determinism import written_once
from transmla.modeling.fixed_cache import Buffers
from transmla.modeling.kernels.one_query import ONE_QUERY

# Steps of one graph; capturing one costs some ten steps, and every step reads the whole buffer. Like the batch it is
# part of what a seed means: rows that leave change which random numbers the others get.
SEGMENT = 192

# Buffers have a multiple of so many columns. Rows of an odd number of weights in bfloat16 begin at addresses that
# matrix products cannot read in whole words; and buffers that serve several batches have to fit prompts that differ a
# little in length.
COLUMNS = 32


def has_fixed_size(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether the model may decode so: layers that see everything, attention that transformers lets us choose, one
    device, and no experts, whose tokens are counted on the CPU."""
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    experts = any(name.endswith("experts") for name, _ in model.named_modules())
    split = len({parameter.device for parameter in model.parameters()}) > 1
    return plain and not capped and not experts and not split and model._supports_attention_backend


class Decoder:
    """Continues batches of rows whose prompts are in a cache.

    Args:
        choose: from logits [B, V] to tokens [B]; nothing in it may wait for the device.
        ends: tokens that end a row.
        generator: what `choose` draws from.
    """

    def __init__(
        self, model: PreTrainedModel, choose: Callable[[Tensor], Tensor], ends: Tensor, generator: torch.Generator
    ) -> None:
        self.model, self.choose, self.ends, self.generator = model, choose, ends, generator
        self.buffers: Buffers | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def run(self, cache: DynamicCache, mask: Tensor, tokens: Tensor, positions: Tensor, steps: int) -> Tensor:
        """Write `steps` tokens after the prompts of one batch.

        Args:
            cache: of the prompts, all of one padded length; it is used up.
            mask: [B, T], which of the cache's columns a row may see.
            tokens, positions: [B], the first token after the prompt, not in the cache yet, and its position.

        Returns:
            [B, steps] tokens, -1 after a row's last step; those after an end token mean nothing.
        """
        if steps == 0:
            return tokens.new_empty(len(tokens), 0)
        before = self.model.config._attn_implementation
        self.model.config._attn_implementation = ONE_QUERY
        try:
            if steps <= SEGMENT:
                return self._whole(cache, mask, tokens, positions, steps)
            return self._in_segments(cache, mask, tokens, positions, steps)
        finally:
            self.model.config._attn_implementation = before

    def _whole(self, cache: DynamicCache, mask: Tensor, tokens: Tensor, positions: Tensor, steps: int) -> Tensor:
        rows, filled = mask.shape
        columns = _columns(filled + steps)
        if self.buffers is not None and self.buffers.size == (rows, columns):
            self.buffers.refill(cache)
            self.mask.fill_(-torch.inf)
            self.mask[:, :, :, :filled] = _additive(mask)
            self.tokens.copy_(tokens[:, None])
            self.positions.copy_(positions[:, None])
            self.done.copy_(self._ended(tokens[:, None]))
            self.place.zero_()
        else:
            self._start(cache, mask, tokens, positions, columns)
            self.chunk = torch.full((rows, SEGMENT), -1, device=tokens.device)
        self._steps(steps)
        return self.chunk[:, :steps].clone()

    def _in_segments(self, cache: DynamicCache, mask: Tensor, tokens: Tensor, positions: Tensor, steps: int) -> Tensor:
        written = torch.full((len(tokens), steps), -1, device=tokens.device)
        rows, filled = torch.arange(len(tokens), device=tokens.device), mask.shape[1]
        self._start(cache, mask, tokens, positions, filled)
        for start in range(0, steps, SEGMENT):
            count = min(SEGMENT, steps - start)
            left = (~self.done).nonzero()[:, 0]
            if not len(left):
                break
            filled += count
            self._keep(left, _columns(filled))
            rows = rows[left]
            self.chunk = torch.full((len(rows), count), -1, device=tokens.device)
            self.place.zero_()
            self._steps(count)
            written[rows, start : start + count] = self.chunk
        self.buffers = self.graph = None
        return written

    def _start(self, cache: DynamicCache, mask: Tensor, tokens: Tensor, positions: Tensor, columns: int) -> None:
        self.buffers = self.graph = None  # their memory goes before more is taken
        self.buffers = Buffers(cache, columns)
        self.mask = F.pad(_additive(mask), (0, columns - mask.shape[1]), value=-torch.inf)
        self.tokens, self.positions = tokens[:, None].clone(), positions[:, None].clone()
        self.done = self._ended(self.tokens)
        self.place = torch.zeros(1, dtype=torch.long, device=tokens.device)

    def _keep(self, left: Tensor, columns: int) -> None:
        self.graph = None  # it replays the old sizes
        rows = None if len(left) == len(self.done) else left
        assert self.buffers is not None, "`_start` makes them"
        self.buffers.rearrange(rows, columns)
        if rows is not None:
            self.mask, self.tokens, self.positions = self.mask[rows], self.tokens[rows], self.positions[rows]
            self.done = self.done[rows]
        self.mask = F.pad(self.mask, (0, columns - self.mask.shape[3]), value=-torch.inf)

    def _ended(self, tokens: Tensor) -> Tensor:
        return (tokens == self.ends).any(1)

    def _steps(self, count: int) -> None:
        if not self.tokens.is_cuda:
            for _ in range(count):
                self._step()
            return
        with torch.cuda.device(self.tokens.device):
            if self.graph is None:
                count -= self._capture(count)
            for _ in range(count):
                assert self.graph is not None, "captured where more than one step is asked for"
                self.graph.replay()
            torch.cuda.synchronize()  # before a graph goes, and its memory with it

    def _capture(self, count: int) -> int:
        """Record a step, where more than one is asked for; returns how many were taken already."""
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
            self.graph = graph  # only a whole one is ever replayed
        return 1

    def _step(self) -> None:
        """One token for every row; all that changes, changes in place."""
        assert self.buffers is not None, "`_start` makes them"
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
        with written_once():
            self.chunk.index_copy_(1, self.place, chosen[:, None])
        self.done |= self._ended(chosen[:, None])
        self.tokens.copy_(chosen[:, None])
        for counter in (self.positions, self.buffers.column, self.place):
            counter += 1


def _columns(needed: int) -> int:
    return -(-needed // COLUMNS) * COLUMNS


def _additive(mask: Tensor) -> Tensor:
    """[B, T], which columns a row may see -> [B, 1, 1, T], what is added to its logits."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(mask == 0, -torch.inf)[
        :, None, None
    ]
