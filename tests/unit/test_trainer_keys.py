"""Keys of trl's configurations: each is decided once, tried out before weights load, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from accelerate import PartialState
from trl import DistillationConfig, SFTConfig

from transmla.errors import RecipeError
from transmla.plan.trainer_checks import check_trainers
from transmla.recipe.refused_trainer_keys import BY_KIND, REFUSED
from transmla.recipe.stages import Distill, Layerwise, OnPolicy, Sft
from transmla.recipe.trainer_keys import RESERVED_TRAINER_KEYS, TrainerKeyError, check_trainer_key, trainer_keys
from transmla.recipe.trainer_values import AS_TRL_SAYS, VALUES

CLASSES = {"SFTConfig": SFTConfig, "DistillationConfig": DistillationConfig}
BUDGET = {"max_length": 64, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_trl_is_decided_once(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(CLASSES[name]) if field.init}
    assert set(trainer_keys(name)) == fields
    decided = [set(RESERVED_TRAINER_KEYS), set(REFUSED), set(VALUES), AS_TRL_SAYS]
    assert {field: sum(field in part for part in decided) for field in fields} == dict.fromkeys(fields, 1)


def test_decisions_are_about_keys_that_there_are() -> None:
    fields = {name for kind in CLASSES for name in trainer_keys(kind)}
    kinds = {name for keys in BY_KIND.values() for name in keys}
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than the oldest transformers that we take
    assert {*RESERVED_TRAINER_KEYS, *REFUSED, *VALUES, *AS_TRL_SAYS, *kinds} - newer <= fields


@pytest.mark.parametrize("key", sorted(set(REFUSED) & set(trainer_keys("SFTConfig"))))
def test_what_is_refused_may_stand_at_its_default(key: str) -> None:
    default = {field.name: field for field in dataclasses.fields(SFTConfig)}[key].default
    if default is not dataclasses.MISSING and default is not None:
        check_trainer_key(key, default)
    with pytest.raises(TrainerKeyError):
        check_trainer_key(key, "something else")


def stage(kind: type = Distill, **trainer: Any):
    names = {Distill: "distill", Layerwise: "layerwise", Sft: "sft", OnPolicy: "on_policy"}
    return kind(kind=names[kind], data=["sample_train"], tokens=4096, trainer=trainer)


def refusal(one: Any) -> str:
    with pytest.raises(RecipeError) as error:
        check_trainers([stage(), one], "cpu", torch.float32, 1)
    return str(error.value)


@pytest.mark.parametrize(
    "kind, key",
    [(Layerwise, "assistant_only_loss"), (Distill, "neftune_noise_alpha"), (OnPolicy, "train_sampling_strategy")],
)
def test_a_key_that_one_kind_does_not_use(kind: type, key: str) -> None:
    value = {"assistant_only_loss": True, "neftune_noise_alpha": 5.0, "train_sampling_strategy": "sequential"}[key]
    with pytest.raises(ValueError, match="leave it out|sft stage"):
        stage(kind, **{key: value})


def test_the_key_to_blame() -> None:
    """One that fails alone; of two that fail together only, one without which all goes well."""
    assert refusal(stage(**BUDGET, optim="nope", save_steps=5)).startswith("recover.1.trainer.optim: trl cannot use it")
    together = {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 0}
    assert refusal(stage(**BUDGET, **together)).startswith("recover.1.trainer.dataloader_prefetch_factor: ")
    wrong = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}
    assert refusal(stage(**wrong, warmup_steps=1)).startswith("recover.1.trainer.lr_scheduler_")


@pytest.mark.parametrize(
    "trainer",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}, "warmup_steps": 0.1},
        {"optim": "adafactor", "weight_decay": 0.1, "max_grad_norm": 0},
        {"report_to": "tensorboard", "logging_strategy": "epoch", "save_strategy": "no", "save_total_limit": None},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
        {"packing": False, "pad_to_multiple_of": 8, "train_sampling_strategy": "group_by_length"},
    ],
)
def test_what_works(trainer: dict[str, Any]) -> None:
    check_trainers([stage(**BUDGET, **trainer)], "cpu", torch.float32, 1)


def test_sampling_of_the_student() -> None:
    fine = {"top_k": 20, "min_p": 0.1, "generation_kwargs": {"typical_p": 0.9}}
    check_trainers([stage(OnPolicy, **fine)], "cpu", torch.float32, 1)
    assert "generation_kwargs" in refusal(stage(OnPolicy, generation_kwargs={"max_new_tokens": 10**6}))


def test_a_plan_leaves_nothing_behind(monkeypatch) -> None:
    """Neither a group of processes with trl's timeout, nor another number format, nor a launcher's setting less."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    before = dict(os.environ), torch.backends.fp32_precision
    check_trainers([stage(tf32=True, **BUDGET), stage(OnPolicy)], "cuda", torch.float32, 2)
    assert (dict(os.environ), torch.backends.fp32_precision) == before
    assert PartialState._shared_state == {}
