"""Keys of trl's configuration classes in a recipe: which there are, their types, and which the recipe decides."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

# Keys of trl's configs that another part of the recipe decides.
RESERVED_TRAINER_KEYS = {
    "output_dir": "output_dir",
    "max_steps": "recover.N.tokens",
    "num_train_epochs": "recover.N.tokens",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "dtype",
    "fp16": "dtype",
    "use_cpu": "device",
    "loss_type": "recover.N.kind",
    "do_train": "recover",
    "do_eval": "evaluate",
    "eval_strategy": "evaluate",
    "average_tokens_across_devices": "nothing (the loss is always the mean over the global batch's tokens)",
    "resume_from_checkpoint": "output_dir (a stage resumes by itself)",
    "dataset_text_field": "data definition's columns",
    "model_init_kwargs": "model",
    "teacher_model_name_or_path": "model",
    "teacher_model_revision": "model",
    "teacher_model_init_kwargs": "model",
    "max_completion_length": "recover.N.max_new_tokens",
    "temperature": "recover.N.temperature",
    "beta": "recover.N.beta",
}


@cache
def _trainer_types(config: str) -> dict[str, Any]:
    import trl

    known = getattr(trl, config)
    hints = typing.get_type_hints(known)
    return {field.name: hints[field.name] for field in dataclasses.fields(known) if field.init}


def check_trainer_key(key: str, value: Any, config: str = "SFTConfig") -> Any:
    """Validate one key of `trainer` against one of trl's configs; returns the value in the field's type.

    Raises:
        ValueError: the key is unknown, the recipe sets it elsewhere, or the value is of another type.
    """
    types = _trainer_types(config)
    if value is None and key in ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps"):
        raise ValueError(f"trainer.{key} must be a number: the token budget is divided by it")
    if key in RESERVED_TRAINER_KEYS and key in types:
        raise ValueError(f"trainer.{key} is set by the recipe: use {RESERVED_TRAINER_KEYS[key]}")
    if key not in types:
        raise ValueError(f"trainer.{key} is not a key of trl's {config}{suggest(key, types)}")
    try:
        return TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"trainer.{key}: {error.errors()[0]['msg']}, got {value!r}") from None


def suggest(key: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown key: the known one that is nearest, if one is near."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
