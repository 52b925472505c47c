"""Refit of the output projections, layer after layer on the student's own stream.

A converted layer gets other inputs than the source's did, because the layers below it changed, and its heads err in
ways that are correlated. One regression a layer corrects what a linear output can: with a the heads' outputs of the
student on its own stream, O minimises  E|y + δ (h - h~) - O a|² + ε|O - O_0|²,  y the source's attention output, h and
h~ the streams of source and student before the layer, δ the share of their drift that this layer takes back. ε is the
one of `DAMPINGS` with the least error on windows that are left out for that; the fit is then made on all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

DAMPINGS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)  # ε in units of the mean of E[a²]

SHARE = 8  # one window in so many judges ε, one of all where there are fewer

UNJUDGED = 1e-2  # ε where there is only one window


class Stream:
    """Hidden states of windows, [n, L, D], in a file: memory does not grow with the number of tokens.

    The file has no name, so that nothing is left of it when the process ends, however it ends.
    """

    def __init__(self, states: tuple[int, int, int], dtype: torch.dtype) -> None:
        count = states[0] * states[1] * states[2]
        with tempfile.TemporaryFile() as room:
            os.posix_fallocate(room.fileno(), 0, count * dtype.itemsize)  # with holes it would fail on a full disk late
            name = f"/proc/self/fd/{room.fileno()}"
            self.states = torch.from_file(name, shared=True, size=count, dtype=dtype).view(states)

    def get(self, rows: slice, device: torch.device) -> Tensor:
        return self.states[rows].to(device, copy=True)  # what is read may be written over before it is used

    def put(self, rows: slice, states: Tensor) -> None:
        self.states[rows] = states.to("cpu", self.states.dtype)


class Layers:
    """A model's decoder layers with the arguments that the model itself gives them: masks, positions, rotations."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = model.model.layers
        self.arguments: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {}

    def _arguments(self, windows: Tensor) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """By layer, for a batch of this size: keywords of the layer and of its attention."""
        if len(windows) not in self.arguments:
            found: list[list[dict[str, Any]]] = [[{}, {}] for _ in self.layers]

            def keep(index: int, place: int, keywords: dict[str, Any]) -> None:
                found[index][place] = {name: value for name, value in keywords.items() if name != "hidden_states"}

            handles = []
            for index, layer in enumerate(self.layers):
                for place, module in enumerate((layer, layer.self_attn)):
                    hook = lambda m, args, kw, index=index, place=place: keep(index, place, kw)  # noqa: E731
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            try:
                self.model.model(input_ids=windows.to(self.model.device), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            self.arguments[len(windows)] = [(one, other) for one, other in found]
        return self.arguments[len(windows)]

    def run(self, index: int, states: Tensor, windows: Tensor) -> Tensor:
        """The whole layer: [B, L, D] -> [B, L, D]."""
        out = self.layers[index](states, **self._arguments(windows)[index][0])
        return out[0] if isinstance(out, tuple) else out

    def attend(self, index: int, states: Tensor, windows: Tensor) -> None:
        """Only norm and attention, for who listens to the attention's modules."""
        layer = self.layers[index]
        layer.self_attn(hidden_states=layer.input_layernorm(states), **self._arguments(windows)[index][1])


@contextmanager
def _listen(module: nn.Module, *, inputs: bool) -> Iterator[list[Tensor]]:
    """A list that holds the module's last input or output."""
    heard: list[Tensor] = []

    def before(module: nn.Module, args: tuple, keywords: dict[str, Any]) -> None:
        heard[:] = [args[0] if args else keywords["hidden_states"]]

    def after(module: nn.Module, args: tuple, out: Any) -> None:
        heard[:] = [out[0] if isinstance(out, tuple) else out]

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True) if inputs else module.register_forward_hook(after)
    )
    try:
        yield heard
    finally:
        handle.remove()


class Moments:
    """Sums of e a^T [D, n] and a a^T [n, n] over tokens, in float64; e are errors, a the inputs of a projection."""

    def __init__(self, weight: Tensor) -> None:
        self.cross = torch.zeros_like(weight, dtype=torch.float64)
        self.gram = self.cross.new_zeros(weight.shape[1], weight.shape[1])
        self.tokens = 0

    def add(self, error: Tensor, inputs: Tensor) -> None:
        """error: [t, D]; inputs: [t, n]."""
        self.cross += (error.mT @ inputs).double()
        self.gram += (inputs.mT @ inputs).double()
        self.tokens += len(inputs)

    def __add__(self, other: Moments) -> Moments:
        both = Moments(self.cross)
        both.cross, both.gram = self.cross + other.cross, self.gram + other.gram
        both.tokens = self.tokens + other.tokens
        return both


def ridge_update(moments: Moments, damping: float) -> Tensor:
    """The Δ that minimises E|e - Δ a|² + ε|Δ|²: E[e a^T] (E[a a^T] + ε)^{-1}, [D, n].

    damping: ε in units of the mean of E[a²].
    """
    level = damping * moments.gram.diagonal().mean().clamp_min(1e-30)
    damped = moments.gram + level * torch.eye(len(moments.gram), dtype=torch.float64, device=moments.gram.device)
    return torch.linalg.solve(damped, moments.cross.mT).mT


def choose_damping(fit: Moments, judge: Moments) -> float | None:
    """The ε of `DAMPINGS` whose update from `fit` leaves the least error on `judge`; None where no update is best."""
    if not judge.tokens:
        return UNJUDGED
    left = []
    for damping in DAMPINGS:
        update = ridge_update(fit, damping)
        left.append(float(((update @ judge.gram) * update).sum() - 2 * (update * judge.cross).sum()))
    return DAMPINGS[min(range(len(left)), key=left.__getitem__)] if min(left) < 0 else None


def stream_bytes(tokens: int, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of the files that a refit on so many tokens needs."""
    return 2 * tokens * hidden * dtype.itemsize


@torch.no_grad()
def refit_outputs(
    source: PreTrainedModel, student: PreTrainedModel, windows: Tensor, *, batch_size: int, drift: float
) -> None:
    """Refit every `o_proj` of a student in place.

    Costs a pass of the source, a pass of the student and a second one of its attentions, and a forward of each for
    every size of batch. Memory: O(D²) and one batch; the streams of both lie in files below the system's temporary
    folder (TMPDIR), `stream_bytes` in all.

    Args:
        windows: calibration tokens, [n, L]. drift: δ, 0 where the source puts a norm behind its attention.
    """
    if student.config._attn_implementation != source.config._attn_implementation:
        raise ValueError("source and student must attend by the same kernel")
    shape = (*windows.shape, source.config.hidden_size)
    device, dtype = source.device, source.dtype
    share = min(SHARE, len(windows))
    rows = [slice(start, start + batch_size) for start in range(0, len(windows), batch_size)]
    original, own = Stream(shape, dtype), Stream(shape, dtype)
    with _listen(source.model.layers[0], inputs=True) as first:
        stop = source.model.layers[0].register_forward_pre_hook(_stop)
        try:
            for part in rows:
                with suppress(_Reached):
                    source.model(input_ids=windows[part].to(device), use_cache=False)
                original.put(part, first[0])
                own.put(part, first[0])
        finally:
            stop.remove()
    one, other = Layers(source), Layers(student)
    for index in tqdm(range(len(source.model.layers)), desc="refit", unit="layer"):
        attention = other.layers[index].self_attn
        projection = attention.o_proj
        weight = projection.weight.float()
        bias = 0.0 if projection.bias is None else projection.bias.float()
        fit, judge = Moments(weight), Moments(weight)
        for part in rows:
            batch = windows[part]
            before, mine = original.get(part, device), own.get(part, device)
            with _listen(one.layers[index].self_attn, inputs=False) as target:
                original.put(part, one.run(index, before, batch))
            with _listen(projection, inputs=True) as heads:
                other.attend(index, mine, batch)
            inputs = heads[0].float()
            wanted = target[0].float() + drift * (before.float() - mine.float())
            error = (wanted - (inputs @ weight.mT + bias)).float()
            judges = torch.arange(part.start, part.start + len(batch)) % share == 1
            for moments, chosen in ((fit, ~judges), (judge, judges)):
                moments.add(error[chosen].flatten(0, 1), inputs[chosen].flatten(0, 1))
        if (damping := choose_damping(fit, judge)) is not None:
            projection.weight.copy_(projection.weight.double() + ridge_update(fit + judge, damping))
        for part in rows:
            own.put(part, other.run(index, own.get(part, device), windows[part]))


class _Reached(Exception):
    """The first layer: what comes before it is all that is wanted."""


def _stop(module: nn.Module, args: tuple) -> None:
    raise _Reached
