"""A transformers trainer whose model is in shards before accelerate sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from transmla.recipe.launch_file import IN_PARTS, Layout, layout, without_fsdp
from transmla.recover.sharded_model import collect, mesh_of, shard
from transmla.recover.zero import fetch_layers_ahead, gather_by_layer, keep_head, partition

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin, which has no trainer of its own


class ShardedTraining(Trainer):
    """Mixin before a `transformers.Trainer`: accelerate puts its autocast around a sharded model, and no wrapper.

    accelerate's own FSDP2 shards what `forward` calls, and takes a loss for a part of `forward`. The losses here call
    attentions one by one and read a head that is never called, so units are chosen in transmla.recover.sharded_model.
    """

    layout: Layout = "whole"

    @property
    def sharded(self) -> bool:
        """Whether the model is in PyTorch's shards."""
        return self.layout == "fsdp2"

    @property
    def in_parts(self) -> bool:
        """Whether no process has all weights."""
        return self.layout in IN_PARTS

    def into_shards(self, student: PreTrainedModel, teacher: PreTrainedModel | None, *, attentions: bool) -> None:
        """Put student and teacher in shards, each of its own root, after everything that reads whole weights.

        teacher: None also where it is in shards already. attentions: whether the loss calls attentions from outside
        their layers.
        """
        if self.layout == "fsdp2":
            mesh, products = mesh_of(self.args.device), torch.bfloat16 if self.args.bf16 else None
            root = self.accelerator.unwrap_model(self.model)
            shard(root, student, mesh, attentions=attentions, products=products)
            if teacher is not None:
                shard(teacher, teacher, mesh, attentions=False, products=None)
        elif self.layout == "zero3":
            fetch_layers_ahead(student, self.accelerator)
            if not attentions:
                gather_by_layer(student)
            keep_head(student)
            if teacher is not None:
                partition(teacher, self.accelerator)

    def leave_shards(self, dtype: torch.dtype, *, key: str, remedy: str) -> None:
        """Make the model whole again, on the first process, in the host's memory; nothing where it is whole.

        Raises:
            RecipeError: a weight is not finite.
        """
        if self.in_parts:
            here = self.is_world_process_zero()
            collect(self.accelerator.unwrap_model(self.model), dtype, here=here, key=key, remedy=remedy)
        if self.is_deepspeed_enabled:
            self.accelerator.free_memory()  # the engine

    def create_accelerator_and_postprocess(self) -> None:
        with without_fsdp():
            super().create_accelerator_and_postprocess()
        self.layout = layout()
        if self.sharded:
            accelerator = self.accelerator
            accelerator.prepare_model = functools.partial(
                accelerator.prepare_model, device_placement=False, evaluation_mode=True
            )
            accelerator.clip_grad_norm_ = functools.partial(_whole_norm, accelerator.clip_grad_norm_)


def _whole_norm(clip: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The norm of all gradients, of which torch's own `clip` gives every process a part."""
    norm = clip(*args, **kwargs)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
