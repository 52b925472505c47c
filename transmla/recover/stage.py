"""Run one recovery stage of a recipe: build the trainer, resume where it stopped, train."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig

from transmla.data.rows import are_whole, carry_rows, config_of_rows, token_rows, whole_rows
from transmla.errors import RecipeError
from transmla.families import FAMILIES
from transmla.modeling.determinism import is_deterministic
from transmla.modeling.kernels.packed import PACKED, kernels_there, needs_mask
from transmla.modeling.student import share_trunk, train_only
from transmla.recipe.launch_file import layout, load_whole
from transmla.recipe.stages import AnyStage, Distill, Layerwise, Sft
from transmla.recover.adapters import lora_config, merge_adapters
from transmla.recover.arguments import DEFAULTS, OWN, common_arguments
from transmla.recover.compiling import compile_layers, plain_layers, why_not
from transmla.recover.distill import DistillTrainer, SFTStageTrainer
from transmla.recover.divergence import Divergence
from transmla.recover.last_step import REMEDY, require_finite, train_to_the_end
from transmla.recover.layerwise import LayerwiseTrainer
from transmla.recover.losses import Mixture
from transmla.recover.teachers.kept import TeacherStates
from transmla.recover.trainer import RecoveryTrainer, weight_sizes

# Packed rows keep documents apart in attention; long documents are split, not cut off. Packed rows of one micro-batch
# are one long row to attention.
PACKING: dict[str, Any] = {"packing": True, "packing_strategy": "bfd_split", "shuffle_dataset": True}


class _Progress(TrainerCallback):
    """Carries the token count over a resume, which trl would start again from zero (it is in every checkpoint's
    log)."""

    def __init__(self, trainer: RecoveryTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._total_train_tokens = _seen_tokens(state.log_history)


def _seen_tokens(log: list[dict[str, Any]]) -> int:
    """How many tokens had been trained on at the end of a log."""
    seen = [line["num_tokens"] for line in log if "num_tokens" in line]
    return int(seen[-1]) if seen else 0


def trainer_config(
    stage: AnyStage,
    folder: Path,
    *,
    seed: int,
    device: str,
    dtype: torch.dtype,
    processes: int,
    kind: type[SFTConfig] = SFTConfig,
) -> SFTConfig:
    """trl's own configuration object for a stage. kind: its class, or one derived from it."""
    config = kind(
        **common_arguments(stage, folder, seed=seed, device=device, dtype=dtype, processes=processes),
        **(DEFAULTS | PACKING | stage.trainer | OWN),
    )
    load_whole()
    return config


@contextmanager
def tensorboard_folder(folder: Path) -> Iterator[None]:
    """Where a trainer made meanwhile writes TensorBoard's files, unless the user's environment says.

    transformers takes the folder from the environment alone, and its default, beside the checkpoints, goes with them.
    """
    name = "TENSORBOARD_LOGGING_DIR"
    chosen = name in os.environ
    os.environ.setdefault(name, str(folder))
    try:
        yield
    finally:
        if not chosen:
            del os.environ[name]


def marks_synthetic(stage: Layerwise | Distill | Sft) -> bool:
    """Whether a stage's rows tell a model's own text from people's."""
    return stage.kind == "distill" and stage.cross_entropy > 0.0 and not stage.synthetic_cross_entropy


def build_trainer(
    stage: Layerwise | Distill | Sft,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    data: Dataset,
    *,
    scales: list[float],
    reserve: int = 0,
    key: str = "recover.N",
) -> RecoveryTrainer:
    """The trainer of a stage. Trained weights are float32 masters; the trunk is shared while it stays frozen.

    Args:
        teacher: None where the stage needs none.
        data: text, messages, or prompt and completion (or token ids, as trl takes them).
        scales: E|output|² of every attention of the source.
        reserve: bytes of the device that training needs, which a kept teacher must leave.
        key: of the stage in the recipe, for errors.

    Raises:
        RecipeError: a teacher is to be kept that the device has no room for, or text that fills no row.
    """
    way = layout()
    if stage.train != "all" and teacher is not None and way in ("whole", "zero2"):
        share_trunk(student, teacher)  # pieces of two models have no common storage
    train_only(student, stage.train)
    if way == "whole":  # FSDP2 makes them piece by piece, DeepSpeed has its own
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    # trl writes its own tokens and template into a tokenizer: what is exported must not depend on which stages ran.
    tokenizer = copy.deepcopy(tokenizer)
    rows = token_rows(data, tokenizer, config, mark_synthetic=marks_synthetic(stage), key=key)
    config = config_of_rows(config)
    common: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer}
    if stage.train == "lora":
        common["peft_config"] = lora_config(stage.lora, student)
    trainer: RecoveryTrainer
    if stage.kind == "layerwise":
        assert teacher is not None, "its loss is against the teacher's attentions"
        trainer = LayerwiseTrainer(
            student,
            config,
            teacher=teacher,
            scales=scales,
            stream=stage.stream,
            hidden=stage.hidden,
            logits=stage.logits,
            **common,
        )
    elif stage.kind == "distill":
        mixture = Mixture(Divergence(stage.divergence, stage.beta), stage.temperature, stage.cross_entropy)
        trainer = DistillTrainer(
            student, config, teacher=teacher, mixture=mixture, final_temperature=stage.final_temperature, **common
        )
    else:
        trainer = SFTStageTrainer(student, config, teacher=None, **common)
    if stage.kind in ("distill", "sft"):
        trainer.trunk_learning_rate = stage.trunk_learning_rate
    trainer.muon_learning_rate = stage.muon_learning_rate
    if stage.relative_learning_rate:
        trainer.sizes = weight_sizes(student)  # before a checkpoint is read, or a resumed run would have other rates
    trainer.train_dataset = whole_rows(trainer.train_dataset, config)
    if stage.kind == "distill" and stage.keep_teacher and config.world_size == 1 and not is_deterministic():
        assert isinstance(trainer, DistillTrainer)
        _keep_teacher(trainer, reserve, f"{key}.keep_teacher")
    _attend_by_documents(trainer, stage)
    one_shape = trainer.batches.packed or (config.packing and config.packing_strategy == "wrapped")
    reason = why_not(stage, student.config, config.device, one_shape=one_shape) if stage.compile == "auto" else None
    if stage.compile and reason is None:
        compile_layers(student, teacher, stage.kind, any_length=trainer.batches.packed)
        # With boundaries a rest would do no harm; where `compile: true` stands it has always been left out.
        if "dataloader_drop_last" not in stage.trainer and (stage.compile is True or not trainer.batches.packed):
            _only_whole_batches(trainer)
        trainer.compiled = "layers compiled"
    if reason is not None:
        trainer.compiled += f" ({reason})"
    compiles = config.device.type == "cuda" or trainer.compiled == "layers compiled"
    # DeepSpeed's gradients go through its own buckets, which a pass of ours would leave filled.
    trainer.rehearses = is_deterministic() and compiles and not trainer.is_deepspeed_enabled
    trainer.add_callback(_Progress(trainer))
    trainer.into_shards(student, teacher, attentions=stage.kind == "layerwise")
    return trainer


def _attend_by_documents(trainer: RecoveryTrainer, stage: Layerwise | Distill | Sft) -> None:
    """Let attention over packed documents go by their boundaries where its kernels can, not by a mask."""
    config, models = trainer.args, [model for model in (trainer.student, trainer.teacher) if model is not None]
    if not trainer.padding_free:
        return
    assert config.max_length is not None
    dtype = torch.bfloat16 if config.bf16 else trainer.student.dtype
    reasons = [needs_mask(model.config, config.max_length, dtype, config.device) for model in models]
    if stage.attention == "mask":
        reasons.append("as asked")
    if stage.kind == "layerwise" and stage.logits:
        reasons.append("the loss compares attention's logits")
    kind = None if trainer.teacher is None else trainer.teacher.config.model_type
    if kind is not None and kind not in FAMILIES:
        reasons.append(f"the teacher is of another family, {kind}")  # which may not hand boundaries through
    why = next((reason for reason in reasons if reason is not None), None)
    if why is None:
        for model in models:
            model.config._attn_implementation = PACKED
        trainer.batches.packed, trainer.batches.kernel = True, stage.attention
    trainer.attention = kernels_there(config.device, stage.attention) if why is None else f"a mask: {why}"


def _keep_teacher(trainer: DistillTrainer, reserve: int, key: str) -> None:
    data: Dataset = trainer.train_dataset
    config, teacher = trainer.args, trainer.teacher
    if not are_whole(data, config):
        raise RecipeError(
            key, f"the text does not fill one row of {config.max_length} tokens; lower trainer.max_length"
        )
    assert config.max_length is not None and teacher is not None
    size = (len(data), config.max_length, teacher.config.hidden_size)
    trainer.states = TeacherStates(*size, dtype=teacher.dtype, device=config.device, reserve=reserve, key=key)
    carry_rows(trainer)


def _only_whole_batches(trainer: RecoveryTrainer) -> None:
    """Leave out what an epoch has left over, for which every layer would be compiled again, where an epoch has a whole
    batch."""
    arguments = trainer.args
    data: Dataset = trainer.train_dataset
    if len(data) >= arguments.per_device_train_batch_size * arguments.world_size:
        arguments.dataloader_drop_last = True


def take_back(trainer: RecoveryTrainer) -> None:
    """Leave both models as `build_trainer` found them: what they compute with, not their weights."""
    del trainer.student.forward  # back to the class's own
    for model in (trainer.student, trainer.teacher):
        if model is not None and model.config._attn_implementation == PACKED:
            model.config._attn_implementation = "sdpa"
    plain_layers(trainer.student, trainer.teacher)


def run_stage(
    trainer: RecoveryTrainer, dtype: torch.dtype, checkpoint: Path | None = None, *, key: str = "recover.N"
) -> dict[str, Any]:
    """Train to the last step, from a checkpoint if there is one.

    The student (`trainer.student`) ends in `dtype` and eval mode, adapters merged.

    Args:
        key: of the stage in the recipe, for errors.

    Returns:
        tokens seen and the log: loss, learning rate, tokens per second by step; by what it was computed; how many
        checkpoints were written, and the seconds that training stood still for them.

    Raises:
        RecipeError: training was stopped before its end, its loss or weights are not finite, or a checkpoint could
            not be written.
    """
    train_to_the_end(trainer, checkpoint, key)
    student = trainer.student
    take_back(trainer)
    # Accelerate would take a student that goes on to another stage for prepared, and leave its autocast out.
    for mark in ("_is_accelerate_prepared", "_original_forward"):
        vars(student).pop(mark, None)
    wide = dtype if trainer.peft_config is None else torch.promote_types(dtype, torch.float32)  # of merged adapters
    trainer.leave_shards(wide, key=key, remedy=REMEDY)
    if trainer.peft_config is not None:
        merge_adapters(trainer.accelerator.unwrap_model(trainer.model))
    for parameter in student.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    student.eval()
    if not trainer.in_parts:
        require_finite(student, key)
    log = trainer.state.log_history
    tokens = trainer._total_train_tokens or _seen_tokens(log)  # none, where a checkpoint of the last step was there
    resumed = None if checkpoint is None else str(checkpoint)
    found = {"tokens": tokens, "log": log, "resumed_from": resumed, "computed_by": trainer.means}
    return found | {"checkpoints": trainer.stalls}
