"""Parameters of source and student, counted on meta tensors, and the memory that a stage needs of a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from transmla.modeling.student import ATTENTION, adapted_layers
from transmla.recipe.budget import micro_batch
from transmla.recipe.stages import QUERIES, AnyStage


@dataclass(frozen=True)
class Sizes:
    """Parameters of source and student, counted on meta tensors; `adapters`: of one rank on all layers that may have
    one."""

    source: int
    student: int
    attention: int
    adapters: dict[str, int]

    def trained(self, stage: AnyStage) -> int:
        """How many a stage trains."""
        if stage.train == "lora":
            return stage.lora.r * self.adapters[stage.lora.targets]
        return self.student if stage.train == "all" else self.attention


def count_parameters(config: PretrainedConfig, student_config: PretrainedConfig) -> Sizes:
    """Numbers of parameters of a source and its student, tied ones once."""
    with torch.device("meta"):
        source = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        student = AutoModelForCausalLM.from_config(student_config, trust_remote_code=False)
    source.tie_weights()
    student.tie_weights()
    attention = sum(value.numel() for name, value in student.named_parameters() if ATTENTION in name)
    return Sizes(
        source=sum(value.numel() for value in source.parameters()),
        student=sum(value.numel() for value in student.parameters()),
        attention=attention,
        adapters={
            targets: sum(layer.in_features + layer.out_features for layer in adapted_layers(student, targets).values())
            for targets in ("attention", "all")
        },
    )


def snapshot_bytes(stage: AnyStage, sizes: Sizes) -> int:
    """Of one checkpoint of a stage, on disk and before that in the machine's memory: trained weights and AdamW's two
    moments, in float32."""
    return 12 * sizes.trained(stage)


def training_memory(stage: AnyStage, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Rough bytes a device needs for a stage without sharding: weights, gradients, AdamW, activations, logits."""
    return _weights(stage, sizes, dtype) + step_memory(stage, sizes, config, dtype)


def _weights(stage: AnyStage, sizes: Sizes, dtype: torch.dtype) -> int:
    """Bytes of student and teacher when training begins: trained weights in float32, a shared trunk once."""
    width = torch.finfo(dtype).bits // 8
    everything = stage.train == "all"
    trained = sizes.trained(stage)
    shared = 0 if everything else sizes.student - sizes.attention
    teacher = 0 if stage.kind == "sft" or (stage.kind == "distill" and stage.teacher == "recorded") else sizes.source
    if teacher == 0 or (stage.kind == "distill" and not isinstance(stage.teacher, str)):
        shared = 0  # another teacher's own size is not known here: it is taken for the source's
    return width * (teacher + sizes.student - shared) + (4 - width) * trained


def step_memory(stage: AnyStage, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Rough bytes that a step needs besides the weights: gradients, AdamW's moments, activations, logits."""
    width = torch.finfo(dtype).bits // 8
    optimizer = 12 * sizes.trained(stage)  # gradient and two moments in float32
    tokens = micro_batch(stage)
    checkpointing = stage.trainer.get("gradient_checkpointing", False)
    # Numbers saved for the backward pass by token and layer: the attention's alone, or the whole layer's; a compiled
    # layer saves fewer (26 GiB in all were measured with 32,768 tokens of SmolLM2-135M, where 24 make 28).
    compiled = getattr(stage, "compile", False)
    if compiled == "auto":
        compiled = torch.cuda.is_available() and stage.trainer.get("packing", True)
    saved = 12 if stage.kind == "layerwise" else 2 if checkpointing else 24 if compiled else 34
    per_layer = config.hidden_size * saved
    activations = tokens * config.num_hidden_layers * per_layer * width
    if (
        stage.kind == "layerwise" and stage.logits
    ):  # logits and two distributions of a sample of queries, until the backward pass
        activations += 10 * config.num_hidden_layers * config.num_attention_heads * tokens * QUERIES
    logits = 3 * min(tokens, 1024) * config.vocab_size * 4 if stage.kind in ("distill", "sft") else 0
    if stage.kind == "on_policy":  # a tile of logits of each model, and the gradients of the head's input
        logits = 3 * min(tokens, 4096) * min(config.vocab_size, 32768) * 4
    return optimizer + activations + logits
