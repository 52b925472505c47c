"""A model's decoder layers run one at a time, with the arguments that the model itself gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Seen = Callable[[int, Tensor, dict[str, Any]], None]


class DecoderLayers:
    """Runs single layers of a model of which no more than that layer need be in memory.

    Masks, positions and rotations come from the model's own forward, in which every layer and the last norm pass on
    what they are given. They are kept by shape of the batch and by attention kernel.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        """device, dtype: of the layers that will run; a model without weights does not know."""
        self.model, self.device, self.dtype = model, device, dtype
        self.layers = model.model.layers
        self._kept: dict[tuple[str | None, int, int], list[dict[str, Any]]] = {}

    def first_states(self, ids: Tensor) -> Tensor:
        """What the first layer is given for token ids [B, L]; the embedding must be in memory."""
        found: list[Tensor] = []

        def keep(index: int, states: Tensor, keywords: dict[str, Any]) -> None:
            if index == 0:
                found.append(states)

        with _passing_on(self.model, keep):
            self.model.model(input_ids=ids.to(self.device), use_cache=False)
        return found[0]

    def arguments(self, index: int, batch: int, length: int) -> dict[str, Any]:
        """Keywords of one layer, `hidden_states` excepted, for states of [batch, length, D]."""
        key = (self.model.config._attn_implementation, batch, length)
        if key not in self._kept:
            found: list[dict[str, Any]] = [{} for _ in self.layers]
            states = torch.zeros(batch, length, self.model.config.hidden_size, dtype=self.dtype, device=self.device)
            with _passing_on(self.model, lambda layer, states, keywords: found[layer].update(keywords)):
                self.model.model(inputs_embeds=states, use_cache=False)
            self._kept[key] = found
        return self._kept[key][index]

    def run(self, index: int, states: Tensor) -> Tensor:
        """The whole layer: [B, L, D] -> [B, L, D]."""
        out = self.layers[index](states, **self.arguments(index, *states.shape[:2]))
        return out[0] if isinstance(out, tuple) else out


@contextmanager
def _passing_on(model: PreTrainedModel, seen: Seen) -> Iterator[None]:
    """The trunk without work: `seen` is called with what every layer is given."""

    def layer_forward(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **keywords: Any) -> Tensor:
            seen(index, hidden_states, keywords)
            return hidden_states

        return forward

    layers, norm = model.model.layers, model.model.norm
    for index, layer in enumerate(layers):
        vars(layer)["forward"] = layer_forward(index)
    vars(norm)["forward"] = lambda states: states
    try:
        yield
    finally:
        for module in (*layers, norm):
            del vars(module)["forward"]


@contextmanager
def listening(module: nn.Module, *, inputs: bool = False, stop: bool = False) -> Iterator[list[Tensor]]:
    """A list that holds the module's last output, or input. stop: nothing behind it is computed; the block ends."""
    heard: list[Tensor] = []

    def before(module: nn.Module, args: tuple, keywords: dict[str, Any]) -> None:
        heard[:] = [args[0] if args else keywords["hidden_states"]]
        if stop:
            raise _HeardError

    def after(module: nn.Module, args: tuple, out: Any) -> None:
        heard[:] = [out[0] if isinstance(out, tuple) else out]
        if stop:
            raise _HeardError

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True) if inputs else module.register_forward_hook(after)
    )
    try:
        with suppress(_HeardError):
            yield heard
    finally:
        handle.remove()


class _HeardError(Exception):
    """What was wanted is there."""
