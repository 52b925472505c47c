"""Steps of a recipe's stages at its shape: random weights, random tokens, nothing is kept."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from transmla.families import default_kernel, family_of
from transmla.families.student_config import student_config
from transmla.files import temporary_folder
from transmla.hardware import peak_memory, reset_peak_memory
from transmla.modeling.student import ATTENTION
from transmla.plan.checks import Prepared
from transmla.plan.memory import training_memory
from transmla.recipe.budget import micro_batch
from transmla.recipe.model_source import ModelSource
from transmla.recipe.stages import Distill, Layerwise, OnPolicy, Sft, is_recorded, other_teacher
from transmla.recover.stage import build_trainer, take_back, trainer_config
from transmla.sources.random_model import make_random_model

STEPS, SKIPPED = 16, 8  # of a stage, and those in the beginning that are not counted: cuDNN makes plans in them
QUIET = {"save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True}

Row = dict[str, Any]


def stage_rows(
    prepared: Prepared, models: tuple[PreTrainedModel, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Row]:
    """One row a stage: tokens a second, seconds to the first step, peak memory and what the plan says of it."""
    teacher, student = models
    for index, stage in enumerate(prepared.recipe.recover):
        name = f"recover.{index} {stage.kind}"
        if isinstance(stage, OnPolicy):
            yield {"stage": name, "skipped": "what it costs depends on what the student writes"}
        elif is_recorded(stage) or other_teacher(stage) is not None:
            yield {"stage": name, "skipped": "its teacher is not the source"}
        else:
            yield _measured(prepared, stage, name, teacher, student, tokenizer)


def random_models(prepared: Prepared) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A source of random weights, and a student that shares its trunk."""
    config = copy.deepcopy(prepared.config)
    own = student_config(config, prepared.geometry, family_of(config))
    made = []
    for one in (config, own):
        with torch.device(prepared.device):
            kernel = default_kernel(prepared.config.model_type)
            options: dict[str, Any] = {"dtype": prepared.dtype, "attn_implementation": kernel}
            made.append(AutoModelForCausalLM.from_config(one, trust_remote_code=False, **options).eval())
    teacher, student = made
    trunk = {name: value for name, value in teacher.state_dict().items() if ATTENTION not in name}
    student.load_state_dict(trunk, strict=False, assign=True)
    return teacher, student


def random_tokenizer() -> PreTrainedTokenizerBase:
    """One that a trainer or sampler may hold, while tokens are drawn."""
    small = {"model_type": "llama", "vocab_size": 260, "hidden_size": 16, "num_attention_heads": 1}
    facts = small | {"intermediate_size": 16, "num_hidden_layers": 1}
    with temporary_folder() as folder:
        make_random_model(ModelSource(source="random", config=facts), folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class _Clock(TrainerCallback):
    """When each step ended, and how many tokens had been seen then."""

    def __init__(self, trainer: Any, device: str) -> None:
        self.trainer, self.device = trainer, device
        self.ends: list[tuple[float, int]] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append((time.monotonic(), self.trainer._total_train_tokens))
        control.should_training_stop = len(self.ends) >= STEPS


def _measured(
    prepared: Prepared,
    stage: Layerwise | Distill | Sft,
    name: str,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Row:
    step = int(stage.trainer.get("gradient_accumulation_steps", 1)) * micro_batch(stage)
    stage = stage.model_copy(update={"tokens": max(stage.tokens, STEPS * step), "trainer": stage.trainer | QUIET})
    trunk = (
        [] if stage.train == "all" else [value for name, value in student.named_parameters() if ATTENTION not in name]
    )
    student = copy.deepcopy(student, {id(value): value for value in trunk})
    reset_peak_memory(prepared.device)
    with temporary_folder() as folder:
        config = trainer_config(stage, folder, seed=0, device=prepared.device, dtype=prepared.dtype, processes=1)
        begun = time.monotonic()
        trainer = build_trainer(
            stage,
            student,
            None if stage.kind == "sft" else teacher,
            tokenizer,
            config,
            _documents(prepared.config.vocab_size, STEPS * step, int(config.max_length or 1024)),
            scales=[1.0] * prepared.config.num_hidden_layers,
        )
        clock = _Clock(trainer, prepared.device)
        trainer.add_callback(clock)
        trainer.train()
        take_back(trainer)
    (first, seen), (last, all_seen) = clock.ends[SKIPPED - 1], clock.ends[-1]
    row = {
        "stage": name,
        "tokens a second": (all_seen - seen) / (last - first),
        "first step after": clock.ends[0][0] - begun,
        "peak memory": peak_memory(prepared.device),
        "planned memory": training_memory(stage, prepared.sizes, prepared.config, prepared.dtype),
        "computed by": trainer.means,
    }
    del trainer, student
    gc.collect()
    if prepared.device == "cuda":
        torch.cuda.empty_cache()
    return row


def _documents(words: int, tokens: int, length: int) -> Dataset:
    """Random tokens in documents of like lengths as reasoning traces: a third of a row in the median, up to five."""
    generator = torch.Generator().manual_seed(0)
    rows: list[list[int]] = []
    while sum(map(len, rows)) < 2 * tokens:
        size = int(length / 3 * float((0.7 * torch.randn((), generator=generator)).exp()))
        rows.append(torch.randint(words, (max(2, min(size, 5 * length)),), generator=generator).tolist())
    return Dataset.from_dict({"input_ids": rows, "labels": rows})
