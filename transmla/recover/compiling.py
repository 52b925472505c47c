"""Compiled layers: small models on a GPU are bound by launches and elementwise passes, not by products."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def _pieces(model: PreTrainedModel, kind: str) -> list[nn.Module]:
    # Layer by layer transfer hangs hooks on attentions, at which a compiled layer would break; the parts are compiled.
    if kind == "layerwise":
        return [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    return list(model.model.layers)


def compile_layers(student: PreTrainedModel, teacher: PreTrainedModel | None, kind: str) -> None:
    """Compile every layer in place: one graph for all layers of a model, compiled once; weights and names stay."""
    for model in (student, teacher):
        for piece in [] if model is None else _pieces(model, kind):
            piece.compile(dynamic=False)


def plain_layers(*models: PreTrainedModel | None) -> None:
    """Undo `compile_layers`."""
    for model in models:
        for module in [] if model is None else model.modules():
            module._compiled_call_impl = None
