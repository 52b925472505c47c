"""Final hidden states and attention errors of models that do not fit in memory: all windows pass one layer, then the
next one is read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from transmla.hardware import trim_memory
from transmla.measure.attention_errors import normalised_error
from transmla.modeling.decoder_layers import DecoderLayers, listening
from transmla.modeling.state_stream import StateStream, batches_of
from transmla.sources.layered_model import EMBEDDING, HEAD, NORM, LayeredModel


@torch.no_grad()
def stream_hidden(
    model: LayeredModel,
    windows: Tensor,
    batch_size: int,
    label: str,
    *,
    beside: Callable[[int], None] | None = None,
) -> Tensor:
    """Hidden states after the last norm, [n, L] -> [n, L, D], in a file or on the GPU (`StateStream`).

    Args:
        beside: called with the number of every layer while the layer is in memory.
    """
    device, layers = model.device, model.layers
    stream = StateStream((*windows.shape, model.config.hidden_size), model.dtype, device=device)
    rows = batches_of(windows, batch_size)
    with model.part(EMBEDDING):
        for part in rows:
            stream.put(part, layers.first_states(windows[part]))
    for index in tqdm(range(model.config.num_hidden_layers), desc=f"evaluate {label}", unit="layer"):
        with model.part(model.layer(index)):
            for part in rows:
                stream.put(part, layers.run(index, stream.get(part, device)))
            if beside is not None:
                beside(index)
        trim_memory()
    with model.part(NORM) as last:
        for part in rows:
            stream.put(part, last(stream.get(part, device)))
    return stream.states


@torch.no_grad()
def head_of(model: LayeredModel) -> Tensor:
    """The head's weight [V, D] on the model's device."""
    with model.part(EMBEDDING if model.tied else HEAD) as part:
        return part.get_parameter("weight").detach()


def output_error(student: DecoderLayers, index: int, inputs: list[tuple[Tensor, Tensor]], scale: float) -> float:
    """Normalised output error of a student attention that is in memory, the mean over tokens.

    Args:
        inputs: what the source's attention is given and puts out, each [B, L, D]. scale: E|o|² of the source's.
    """
    total = torch.zeros((), device=student.device)
    for given, expected in inputs:
        keywords = student.arguments(index, *given.shape[:2])
        out, _ = student.layers[index].self_attn(hidden_states=given, **keywords)
        total = total + normalised_error(out, expected, scale)
    return float(total) / sum(given.shape[0] * given.shape[1] for given, _ in inputs)


def attention_of(source: DecoderLayers, index: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """What the attention of a layer that is in memory is given and what it puts out, from the layer's input."""
    module = source.layers[index].self_attn
    with listening(module, stop=True) as out, listening(module, inputs=True) as given:
        source.run(index, states)
    return given[0], out[0]


class LayerErrors:
    """Output errors of a student's attentions on the teacher's inputs, layer by layer beside the student's own pass."""

    def __init__(self, teacher: LayeredModel, student: LayeredModel, window: Tensor, scales: list[float]) -> None:
        """window: [1, L]. scales: E|o|² of every teacher attention."""
        self.teacher, self.student, self.scales = teacher, student, scales
        with torch.no_grad(), teacher.part(EMBEDDING):
            self.states = teacher.layers.first_states(window)
        self.found: list[float] = []

    @torch.no_grad()
    def __call__(self, index: int) -> None:
        """Compare one layer; the student's is in memory."""
        with self.teacher.part(self.teacher.layer(index)):
            inputs = attention_of(self.teacher.layers, index, self.states)
            self.found.append(output_error(self.student.layers, index, [inputs], self.scales[index]))
            self.states = self.teacher.layers.run(index, self.states)
