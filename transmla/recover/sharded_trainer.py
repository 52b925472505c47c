"""A transformers trainer whose model is in shards before accelerate sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from transmla.launch import Layout, layout, without_fsdp

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin, which has no trainer of its own


class ShardedTraining(Trainer):
    """Mixin before a `transformers.Trainer`: accelerate puts its autocast around a sharded model, and no wrapper.

    accelerate's own FSDP2 shards what `forward` calls, and takes a loss for a part of `forward`. The losses here call
    attentions one by one and read a head that is never called, so units are chosen here (transmla.recover.shards).
    """

    layout: Layout = "whole"

    @property
    def sharded(self) -> bool:
        """Whether the model is in PyTorch's shards."""
        return self.layout == "fsdp2"

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
