"""A model in shards (PyTorch's FSDP2): which modules are gathered together, and the way back to whole weights."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from transmla.errors import RecipeError

T = TypeVar("T")

RUN = "run_gathered"  # a sharded root's method that runs a function meanwhile


def mesh_of(device: torch.device) -> DeviceMesh:
    """All processes, in one row."""
    return init_device_mesh(device.type, (distributed.get_world_size(),))


def shard(
    root: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, *, attentions: bool, products: torch.dtype | None
) -> None:
    """Leave of every weight the part that this process keeps, in place.

    A decoder layer is gathered for its own forward and backward pass, everything outside the layers (embedding, last
    norm, head) for the root's. Trained weights become float32 first.

    Args:
        root: what is called: the model, or peft's wrapper around it.
        attentions: whether attentions are called from outside their layers, so that each is gathered by itself.
        products: number format of the products, in which layers are gathered; None: as they are kept.
    """
    kept = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        _master_weights(layer)  # layer by layer, so that a model in float32 is never whole
        if attentions:
            fully_shard(layer.self_attn, mesh=mesh, mp_policy=narrow)
        fully_shard(layer, mesh=mesh, mp_policy=narrow)
    _master_weights(root)
    # Not freed after the forward pass, where the backward pass begins with it; a model without one frees it.
    frozen = not any(value.requires_grad for value in root.parameters())
    fully_shard(root, mesh=mesh, mp_policy=kept, reshard_after_forward=frozen)
    setattr(root, RUN, types.MethodType(lambda self, call: call(), root))
    register_fsdp_forward_method(root, RUN)


def _master_weights(module: nn.Module) -> None:
    for value in module.parameters():
        if value.requires_grad and not isinstance(value, DTensor):
            value.data = value.data.float()


def gathered(root: nn.Module | None, call: Callable[[], T]) -> T:
    """What `call()` gives, while a sharded root's own weights are whole; those of its layers are when they are run."""
    found: list[T] = []  # what a forward returns would get hooks for its backward pass
    if isinstance(root, FSDPModule):
        getattr(root, RUN)(lambda: found.append(call()))
    elif root is not None and in_zero3(root):
        root(lambda: found.append(call()))
    else:
        found.append(call())
    return found[0]


def in_zero3(root: nn.Module) -> bool:
    """Whether a model's weights are in DeepSpeed's shards."""
    return any(hasattr(value, "ds_id") for value in root.parameters())


@contextmanager
def kept_whole(root: nn.Module) -> Iterator[None]:
    """Meanwhile every layer stays whole once it was run, as for sampling, which runs it for every token."""
    layers = [module for module in root.modules() if isinstance(module, FSDPModule) and module is not root]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


@torch.no_grad()
def collect(root: nn.Module, dtype: torch.dtype, *, here: bool, key: str, remedy: str) -> None:
    """Make a sharded model whole again, in place, weight by weight, in the host's memory of one process.

    Args:
        dtype: of the whole weights.
        here: whether this process keeps them; elsewhere they are left without content.
        key, remedy: for errors.

    Raises:
        RecipeError: a weight is not finite; on all processes.
    """
    modules = list(root.modules())
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for name, value in root.named_parameters():
        with _whole(value) as full:
            if not full.isfinite().all():
                raise RecipeError(key, f"{name} is not finite after the last step; {remedy}")
            kept = full.to(device="cpu" if here else "meta", dtype=dtype, copy=True)
            whole[value] = nn.Parameter(kept, requires_grad=False)
    for module in modules:
        module._parameters = {
            name: None if value is None else whole[value] for name, value in dict.items(module._parameters)
        }
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        if isinstance(module, FSDPModule):
            vars(module).pop(RUN, None)
            plain = [kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule)]
            module.__class__ = plain[0]  # type: ignore[assignment]  # what `fully_shard` made a class of its own


@contextmanager
def _whole(value: nn.Parameter) -> Iterator[Tensor]:
    """All of a weight, of which every process keeps a part."""
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            yield value.data
    else:
        yield value.full_tensor() if isinstance(value, DTensor) else value.data
