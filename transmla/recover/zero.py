"""A model in DeepSpeed's ZeRO-3: every module gathers its own weights when it is called."""

from __future__ import annotations

import types

from accelerate import Accelerator
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed


def keep_head(model: PreTrainedModel) -> None:
    """Have a model's head gathered with its own forward and backward pass: losses read it, and nobody calls it."""
    import deepspeed

    deepspeed.zero.register_external_parameter(model, model.get_output_embeddings().weight)


def partition(teacher: PreTrainedModel, accelerator: Accelerator) -> None:
    """Leave of every weight of a frozen model the part that this process keeps, in place.

    What the model itself is called with is then a function, which runs while its head is whole.
    """
    teacher.forward = types.MethodType(lambda self, call: call(), teacher)
    keep_head(teacher)
    prepare_deepspeed(teacher, accelerator)
