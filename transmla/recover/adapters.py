"""Low-rank adapters through peft, and what becomes of them when a stage ends."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from transmla.modeling.student import adapted_layers
from transmla.recipe.stages import Lora


def lora_config(section: Lora, student: PreTrainedModel) -> LoraConfig:
    """peft's configuration: adapters on every linear layer of the student's attentions, or of the MLPs too.

    Layers are named in full, because the names of an attention's projections depend on its form (a query rank, a norm).
    """
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=list(adapted_layers(student, section.targets)),
    )


def merge_adapters(model: PeftModel) -> None:
    """Fold the adapters into the student they are in.

    The sum is formed in float32: in bfloat16 most of a small change would be rounded away layer by layer. It is formed
    in place, so in a copy: the trunk's storage may be the teacher's.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
    model.merge_and_unload()
