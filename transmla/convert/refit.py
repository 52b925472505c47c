"""Refit of the output projections, layer after layer on the student's own stream.

A converted layer gets other inputs than the source's did, because the layers below it changed, and its heads err in
ways that are correlated. One regression a layer corrects what a linear output can: with a the heads' outputs of the
student on its own stream, O minimises  E|y + δ (h - h~) - O a|² + ε|O - O_0|²,  y the source's attention output, h and
h~ the streams of source and student before the layer, δ the share of their drift that this layer takes back. ε is the
one of `DAMPINGS` with the least error on windows that are left out for that; the fit is then made on all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from transmla.modeling.decoder_layers import DecoderLayers, listening
from transmla.modeling.state_stream import StateStream, batches_of

DAMPINGS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)  # ε in units of the mean of E[a²]

SHARE = 8  # one window in so many judges ε, one of all where there are fewer

UNJUDGED = 1e-2  # ε where there is only one window


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

    Costs a pass of the source, a pass of the student and a second one of its attentions. Memory: O(D²) and one batch;
    the streams of both lie in files below the system's temporary folder (TMPDIR), `stream_bytes` in all.

    Args:
        windows: calibration tokens, [n, L]. drift: δ, 0 where the source puts a norm behind its attention.
    """
    if student.config._attn_implementation != source.config._attn_implementation:
        raise ValueError("source and student must attend by the same kernel")
    shape = (*windows.shape, source.config.hidden_size)
    one, other = (DecoderLayers(model, source.device, source.dtype) for model in (source, student))
    original, own = StateStream(shape, source.dtype), StateStream(shape, source.dtype)
    for part in batches_of(windows, batch_size):
        states = one.first_states(windows[part])
        original.put(part, states)
        own.put(part, states)
    for index in tqdm(range(len(source.model.layers)), desc="refit", unit="layer"):
        refit_layer(one, other, index, original, own, batch_size=batch_size, drift=drift)


@torch.no_grad()
def refit_layer(
    source: DecoderLayers,
    student: DecoderLayers,
    index: int,
    original: StateStream,
    own: StateStream,
    *,
    batch_size: int,
    drift: float,
) -> None:
    """Refit the `o_proj` of one student layer in place, and take both streams over the layer.

    Args:
        original, own: states of source and student before the layer, then behind it.
    """
    device, count = source.device, len(original.states)
    rows, share = batches_of(original.states, batch_size), min(SHARE, count)
    projection = student.layers[index].self_attn.o_proj
    weight = projection.weight.float()
    bias = 0.0 if projection.bias is None else projection.bias.float()
    fit, judge = Moments(weight), Moments(weight)
    for part in rows:
        before, mine = original.get(part, device), own.get(part, device)
        with listening(source.layers[index].self_attn) as target:
            original.put(part, source.run(index, before))
        with listening(projection, inputs=True, stop=True) as heads:
            student.run(index, mine)
        inputs = heads[0].float()
        wanted = target[0].float() + drift * (before.float() - mine.float())
        error = (wanted - (inputs @ weight.mT + bias)).float()
        judges = torch.arange(part.start, part.stop) % share == 1
        for moments, chosen in ((fit, ~judges), (judge, judges)):
            moments.add(error[chosen].flatten(0, 1), inputs[chosen].flatten(0, 1))
    if (damping := choose_damping(fit, judge)) is not None:
        projection.weight.copy_(projection.weight.double() + ridge_update(fit + judge, damping))
    for part in rows:
        own.put(part, student.run(index, own.get(part, device)))
