"""A model in DeepSpeed's ZeRO-3: every module gathers its own weights when it is called."""

from __future__ import annotations

import types

from accelerate import Accelerator
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed

LAYERS_LIVE = 3  # the one that is computed, the next, and one that is being freed


def fetch_layers_ahead(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Have the next decoder layer gathered while one is computed, unless the launch file's own numbers say otherwise.

    DeepSpeed stops to gather ahead where 1e9 weights are whole, and a large vocabulary's head and embedding, which are
    whole all along, are more.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    layers = model.model.layers
    layer = max(sum(value.numel() for value in one.parameters()) for one in layers)
    outside = sum(value.numel() for value in model.parameters()) - sum(value.numel() for value in layers.parameters())
    settings.setdefault("stage3_prefetch_bucket_size", layer)
    settings.setdefault("stage3_max_live_parameters", max(10**9, outside + LAYERS_LIVE * layer))


def gather_by_layer(model: PreTrainedModel) -> None:
    """Have a decoder layer gathered as one, where it may be: DeepSpeed looks up the weights of every module otherwise,
    which takes longer than the products of a layer.

    It may be where nothing is trained, and where the embedding is: of a layer whose input asks for no gradient,
    DeepSpeed would send the gradients before they are there, which are zeros.
    """
    trained = any(value.requires_grad for value in model.parameters())
    if not trained or model.get_input_embeddings().weight.requires_grad:
        for layer in model.model.layers:
            layer._z3_leaf = True  # what `deepspeed.utils.set_z3_leaf_modules` sets, by class


def keep_head(model: PreTrainedModel) -> None:
    """Have a model's head gathered with its own forward and backward pass: losses read it, and nobody calls it."""
    import deepspeed

    deepspeed.zero.register_external_parameter(model, model.get_output_embeddings().weight)


def partition(teacher: PreTrainedModel, accelerator: Accelerator) -> None:
    """Leave of every weight of a frozen model the part that this process keeps, in place.

    What the model itself is called with is then a function, which runs while its head is whole.
    """
    gather_by_layer(teacher)
    teacher.forward = types.MethodType(lambda self, call: call(), teacher)
    keep_head(teacher)
    prepare_deepspeed(teacher, accelerator)
