"""Parameters of source and student, counted on meta tensors, and the memory that a stage needs of a device."""

from __future__ import annotations

from collections.abc import Collection
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
    return sum(memory_by_part(stage, sizes, config, dtype).values())


def memory_by_part(
    stage: AnyStage,
    sizes: Sizes,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    layout: str = "whole",
    processes: int = 1,
    offloaded: Collection[str] = (),
) -> dict[str, int]:
    """Rough bytes that a stage needs of each device, by part: `weights` of student and teacher, `gradients`,
    `optimizer`, `gathered` (what is whole only while it is computed with), `activations`, `logits`.

    Of N processes, each with a device:

    | layout | weights | gradients | optimizer |
    |---|---|---|---|
    | whole (one process, DDP) | all | all, twice with several processes: DDP sends copies | all |
    | zero2 | all, in the model's number format | 1/N | 1/N, with the weights in float32 |
    | fsdp2, zero3 | 1/N of student and teacher, which share nothing | 1/N | 1/N; of zero3 with float32 weights |

    Args:
        layout: where weights, gradients and moments lie, as the launch file has it. offloaded: `optimizer` or `weights`
            that DeepSpeed keeps in the host's memory.
    """
    width, trained = torch.finfo(dtype).bits // 8, sizes.trained(stage)
    share = 1 if layout == "whole" else processes
    in_shards, by_deepspeed = layout in ("fsdp2", "zero3"), layout.startswith("zero")
    models = model_parameters(stage, sizes, apart=in_shards)
    weights = width * models + (0 if by_deepspeed else (4 - width) * trained)
    outside, layer = _units(sizes, config)
    moments = _moment_bytes(stage) * trained + (4 * trained if by_deepspeed else 0)
    if getattr(stage, "muon_learning_rate", None) is not None:  # one moment of a matrix, where AdamW has two
        moments -= 4 * (trained - outside if stage.train == "all" else trained)
    copies = 2 if layout == "whole" and processes > 1 else 1
    gathered = width * REDUCED if by_deepspeed else 0
    if in_shards:  # what stands outside the layers, of student and teacher; a layer and the one fetched next
        wide = width if by_deepspeed or stage.train != "all" else 4  # also of gradients before they are shared out
        learning = wide * (outside + layer) if stage.train == "all" else 4 * layer
        gathered += (wide + (width if _teacher(stage, sizes) else 0)) * outside + 2 * width * layer + learning
    return {
        "weights": 0 if "weights" in offloaded else weights // (share if in_shards else 1),
        "gradients": 0 if "optimizer" in offloaded else copies * 4 * trained // share,
        "optimizer": 0 if "optimizer" in offloaded else moments // share,
        "gathered": gathered,
        "activations": _activations(stage, config, width),
        "logits": _logits(stage, config),
    }


REDUCED = 5 * 10**8  # numbers that DeepSpeed sends at a time (reduce_bucket_size), in a buffer that is always there

# Bytes that an optimizer keeps of a trained weight; AdamW's are 8.
MOMENTS = {"8bit": 2, "4bit": 1, "adafactor": 0, "lion": 4, "sgd": 0, "rmsprop": 4, "adagrad": 4}


def _moment_bytes(stage: AnyStage) -> int:
    name = str(stage.trainer.get("optim", "adamw"))
    return next((size for part, size in MOMENTS.items() if part in name), 8)


def _units(sizes: Sizes, config: PretrainedConfig) -> tuple[int, int]:
    """Parameters outside the decoder layers, and of one layer."""
    outside = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return outside, max(0, sizes.student - outside) // config.num_hidden_layers


def _teacher(stage: AnyStage, sizes: Sizes) -> int:
    """Parameters of the model that the loss asks; another one's own are not known here, and taken for the source's."""
    silent = stage.kind == "sft" or (stage.kind == "distill" and stage.teacher == "recorded")
    return 0 if silent else sizes.source


def model_parameters(stage: AnyStage, sizes: Sizes, *, apart: bool) -> int:
    """Of student, adapters and teacher, a shared trunk once. apart: whether nothing is shared."""
    teacher, adapters = _teacher(stage, sizes), sizes.trained(stage) if stage.train == "lora" else 0
    another = stage.kind == "distill" and not isinstance(stage.teacher, str)
    shared = 0 if apart or another or not teacher or stage.train == "all" else sizes.student - sizes.attention
    return teacher + sizes.student + adapters - shared


def step_memory(stage: AnyStage, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Rough bytes that a step needs besides the weights: gradients, AdamW's moments, activations, logits."""
    parts = memory_by_part(stage, sizes, config, dtype)
    return sum(size for name, size in parts.items() if name != "weights")


def _activations(stage: AnyStage, config: PretrainedConfig, width: int) -> int:
    tokens = micro_batch(stage)
    checkpointing = stage.trainer.get("gradient_checkpointing", False)
    # Numbers saved for the backward pass by token and layer, in widths of the model: the attention's alone, the whole
    # layer's, or both without the inputs of frozen matrices. A compiled layer saves fewer (26 GiB in all were measured
    # with 32,768 tokens of SmolLM2-135M, where 24 make 28).
    compiled = getattr(stage, "compile", False)
    if compiled == "auto":
        compiled = torch.cuda.is_available() and stage.trainer.get("packing", True)
    wider = config.intermediate_size / config.hidden_size * (getattr(config, "num_experts_per_tok", None) or 1)
    whole = 24 if compiled else 34 if stage.train == "all" else 16 + 2.4 * wider
    saved = 12 if stage.kind == "layerwise" else 2 if checkpointing else whole
    activations = int(tokens * config.num_hidden_layers * config.hidden_size * saved) * width
    if checkpointing:
        activations += tokens * config.hidden_size * 34 * width  # the layer that is computed again
    if stage.kind == "layerwise" and stage.logits:
        # logits and two distributions of a sample of queries, until the backward pass
        activations += 10 * config.num_hidden_layers * config.num_attention_heads * tokens * QUERIES
    return activations


def _logits(stage: AnyStage, config: PretrainedConfig) -> int:
    tokens = micro_batch(stage)
    if stage.kind == "on_policy":  # a tile of logits of each model, and the gradients of the head's input
        return 3 * min(tokens, 4096) * min(config.vocab_size, 32768) * 4
    return 3 * min(tokens, 1024) * config.vocab_size * 4 if stage.kind in ("distill", "sft") else 0
