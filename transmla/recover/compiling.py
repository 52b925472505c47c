"""Compiled layers: small models on a GPU are bound by launches and elementwise passes, not by products."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from transmla.hardware import has_compiler
from transmla.recipe.launch_file import layout
from transmla.recipe.stages import Distill, Layerwise, Sft

FEW = 1_000_000  # tokens of a stage that is over before a compiler would have paid


def why_not(
    stage: Layerwise | Distill | Sft, config: PretrainedConfig, device: torch.device, *, one_shape: bool
) -> str | None:
    """What `compile: auto` goes by: why the layers are not compiled; None: they are.

    Args:
        one_shape: rows have one length, or attention goes by the boundaries of documents: one graph is for all of them.
    """
    if device.type != "cuda":
        return "off a GPU it takes longer than it saves"
    if stage.tokens < FEW:
        return f"it takes longer than {stage.tokens:,} tokens without"
    if layout() == "zero3":
        return "weights are gathered inside the layers"
    if stage.train == "lora":
        return "adapters are wrapped around the layers"
    if stage.kind == "layerwise" and stage.logits:
        return "attention's logits are read inside the layers"
    if getattr(config, "num_local_experts", None):
        return "every batch chooses other experts"
    if not one_shape:
        return "rows differ in length and are padded"
    if find_spec("triton") is None:
        return "there is no Triton"
    return None if has_compiler() else "there is no C compiler on the PATH"


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
