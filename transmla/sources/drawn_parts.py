"""Random weights of a model, every part drawn by a seed of its own: a part is the same without the others, so that a
model of any size can be drawn one part at a time."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from transmla.sources.layered_model import LayeredModel, model_without_weights


class DrawnParts:
    """Draws parts as the architecture initialises them, in float32 on the CPU, so that they are the same everywhere."""

    def fill(self, model: PreTrainedModel, part: str, device: torch.device) -> None:
        """Put the weights of a part into the model, in its dtype, on the device."""
        module, dtype = model.get_submodule(part), model.dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "big"))
            for inner in module.modules():
                for name, value in list(inner.named_parameters(recurse=False)):
                    setattr(inner, name, nn.Parameter(torch.zeros(value.shape), requires_grad=False))
                model._init_weights(inner)
                for name, value in list(inner.named_parameters(recurse=False)):
                    setattr(inner, name, nn.Parameter(value.to(device, dtype), requires_grad=False))


def drawn_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, key: str) -> LayeredModel:
    """A random model, of which one part is in memory at a time. key: for errors."""
    return LayeredModel(model_without_weights(config, dtype, device), DrawnParts(), device, key)
