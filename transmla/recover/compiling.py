"""Compiled layers: small models on a GPU are bound by launches and elementwise passes, not by products."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def _pieces(model: PreTrainedModel, kind: str) -> list[nn.Module]:
    # Layer by layer transfer reads what attentions give by hooks, which a compiled layer would run through.
    if kind == "layerwise":
        return [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    return list(model.model.layers)


def compile_layers(
    student: PreTrainedModel, teacher: PreTrainedModel | None, kind: str, *, any_length: bool = False
) -> None:
    """Compile every layer's `forward` in place: one graph for all layers of a model; weights and names stay.

    Args:
        any_length: the rows differ in length: one graph for all of them, which costs a little.

    Not `nn.Module.compile`: that compiles the call with its hooks, and all modules share that function's few graphs.
    """
    for model in (student, teacher):
        for piece in [] if model is None else _pieces(model, kind):
            piece.forward = torch.compile(piece.forward, dynamic=any_length)


def plain_layers(*models: PreTrainedModel | None) -> None:
    """Undo `compile_layers`, and free its graphs for the next stage's."""
    found = [module for model in models if model is not None for module in model.model.modules()]
    compiled = [module for module in found if "forward" in vars(module)]
    for module in compiled:
        del module.forward
    if compiled:
        torch._dynamo.reset()
