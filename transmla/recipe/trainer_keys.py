"""Keys of trl's configuration classes in a recipe: which there are, their types, and which of them a stage takes."""

from __future__ import annotations

import ast
import builtins
import difflib
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from transmla.recipe.refused_trainer_keys import BY_KIND, REFUSED
from transmla.recipe.trainer_values import AS_TRL_SAYS, VALUES

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


# Files of the classes, whose fields are read without importing them: that takes seconds.
FILES = {
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "DistillationConfig": ("trl", "trainer/distillation_config.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
}


class _Names(dict[str, Any]):
    """What annotations may name: builtins and typing's; any other name is a class of trl's or transformers' own."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, getattr(typing, name, Any))


UNKNOWN = object()  # a default that is no literal


@dataclass(frozen=True)
class TrainerKey:
    """A field of one of trl's configurations. type: Any where it is a class of trl's or transformers' own."""

    type: Any
    default: Any


class TrainerKeyError(ValueError):
    """A key of `trainer` that a stage does not take, or not with this value."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


@cache
def trainer_keys(config: str) -> dict[str, TrainerKey]:
    """The keys of one of trl's configuration classes, as its source states them.

    A type that is neither a builtin's nor typing's is Any; the class itself judges it (transmla.plan.trainer_checks).
    """
    package, file = FILES[config]
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is a dependency of this project"
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == config)
    found: dict[str, TrainerKey] = {}
    for base in body.bases:
        assert isinstance(base, ast.Name), f"{config} derives from {ast.unparse(base)}"
        found |= trainer_keys(base.id)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_argument(node.value):
            kind = eval(ast.unparse(node.annotation), {}, _Names())  # noqa: S307 - trl's own source
            found[node.target.id] = TrainerKey(kind, _default(node.value))
    return found


def _is_argument(value: ast.expr | None) -> bool:
    """Whether a dataclass takes the field as an argument."""
    words = value.keywords if isinstance(value, ast.Call) else []
    return not any(word.arg == "init" and ast.unparse(word.value) == "False" for word in words)


def _default(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    try:
        return UNKNOWN if value is None else ast.literal_eval(value)
    except ValueError:  # a name or a call
        return UNKNOWN


def check_trainer_key(key: str, value: Any, config: str = "SFTConfig") -> Any:
    """Validate one key of `trainer` against one of trl's configs; returns the value in the field's type.

    Raises:
        TrainerKeyError: the key is unknown, does nothing here, or is set elsewhere; or the value cannot be meant.
    """
    keys = trainer_keys(config)
    if value is None and key in ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps"):
        raise TrainerKeyError(key, "must be a number: the token budget is divided by it")
    if key in RESERVED_TRAINER_KEYS and key in keys:
        raise TrainerKeyError(key, f"is set by the recipe: use {RESERVED_TRAINER_KEYS[key]}")
    if key not in keys:
        raise TrainerKeyError(key, f"is not a key of trl's {config}{suggest(key, keys)}")
    if key in REFUSED and value != keys[key].default:
        raise TrainerKeyError(key, REFUSED[key])
    if key not in VALUES and key not in AS_TRL_SAYS and key not in REFUSED:
        raise TrainerKeyError(key, "is newer than this project, and may do nothing in its trainers; leave it out")
    wanted = VALUES.get(key, keys[key].type)
    if isinstance(value, bool) and wanted in (int, float):
        raise TrainerKeyError(key, f"give a number in the place of {str(value).lower()}")
    limits = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        return TypeAdapter(wanted, config=limits).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise TrainerKeyError(key, f"{message}, got {value!r}") from None


def check_kind(trainer: dict[str, Any], kind: str) -> None:
    """Refuse keys that one kind of stage alone does not use.

    Raises:
        TrainerKeyError: for the first of them.
    """
    for key, reason in BY_KIND[kind].items():
        if trainer.get(key):
            raise TrainerKeyError(key, reason)


def suggest(key: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown key: the known one that is nearest, if one is near."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
