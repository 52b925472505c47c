"""A model of which one part is in memory at a time: its embedding, one decoder layer, its last norm, or its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from transmla.errors import RecipeError
from transmla.families import default_kernel
from transmla.modeling.decoder_layers import DecoderLayers
from transmla.sources.weight_files import AGAIN, listed
from transmla.sources.weight_values import extremes

ZEROS = "nothing but zeros"
EMBEDDING, LAYER, NORM, HEAD = "model.embed_tokens", "model.layers.{}", "model.norm", "lm_head"


class PartWeights(Protocol):
    """Where the weights of a part come from."""

    def fill(self, model: PreTrainedModel, part: str, device: torch.device) -> None:
        """Put the weights of a part into the model, in its dtype, on the device."""


def model_without_weights(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """transformers' model without memory for its weights; what follows from the configuration (rotary frequencies) is
    on the device."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=default_kernel(config.model_type), trust_remote_code=False
        )
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


class LayeredModel:
    """A causal language model whose weights are read when they are needed and let go afterwards.

    model: transformers' own, without weights but those of the part that is in memory. layers: runs single layers.
    """

    def __init__(
        self, model: PreTrainedModel, weights: PartWeights, device: torch.device, key: str, *, source: bool = True
    ) -> None:
        """key: of the source in the recipe, for errors. source: whether it is one, which has no matrix of zeros."""
        self.model, self.weights, self.device, self.key, self.source = model, weights, device, key, source
        self.layers = DecoderLayers(model, device, model.dtype)
        self._tied = dict(getattr(model, "all_tied_weights_keys", None) or {})

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights in memory."""
        return self.model.dtype

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return f"{HEAD}.weight" in self._tied

    @property
    def parts(self) -> list[str]:
        """Names of all parts, in the order in which text passes them; a tied head is none of its own."""
        inside = [self.layer(index) for index in range(self.config.num_hidden_layers)]
        return [EMBEDDING, *inside, NORM] + ([] if self.tied else [HEAD])

    def layer(self, index: int) -> str:
        """The name of a decoder layer as a part."""
        return LAYER.format(index)

    @contextmanager
    def part(self, name: str) -> Iterator[nn.Module]:
        """A part in memory until the block ends.

        Raises:
            RecipeError: a weight is not finite, or a matrix is nothing but zeros.
        """
        module = self.model.get_submodule(name)
        self.weights.fill(self.model, name, self.device)
        try:
            self._check(name)
            yield module
        finally:
            for inner in module.modules():
                for weight, value in list(inner.named_parameters(recurse=False)):
                    empty = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
                    setattr(inner, weight, empty)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The weights of a part that is in memory, by their names in the model; a tied head is none of its own."""
        found = self.model.get_submodule(name).state_dict(prefix=f"{name}.")
        return {weight: value for weight, value in found.items() if weight not in self._tied}

    def _check(self, name: str) -> None:
        tensors = {weight: value for weight, value in self.tensors(name).items() if value.is_floating_point()}
        found = {weight: extremes(value) for weight, value in tensors.items() if value.numel()}
        large = f"NaN, infinite or too large for {str(self.dtype).removeprefix('torch.')}"
        for what, wrong in (
            (f"values that are {large}", [weight for weight, both in found.items() if not all(map(isfinite, both))]),
            (ZEROS, [weight for weight, both in found.items() if tensors[weight].ndim > 1 and both == (0, 0)]),
        ):
            if wrong and (self.source or what != ZEROS):
                raise RecipeError(self.key, f"{listed(wrong)} hold {what}; {AGAIN}")


def save_configuration(model: PreTrainedModel, folder: Path) -> None:
    """Write the configurations of a model without weights, as transformers does beside its weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
