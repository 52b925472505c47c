"""Keys of trl's configuration classes in a recipe: which there are, their types, and which the recipe decides."""

from __future__ import annotations

import ast
import builtins
import difflib
import typing
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
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
    "save_only_model": "nothing (a stage goes on from its checkpoints, which need the optimizer)",
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


@cache
def trainer_types(config: str) -> dict[str, Any]:
    """The keys of one of trl's configuration classes with their types, as its source states them.

    A type that is neither a builtin's nor typing's is Any; the class itself judges it when a stage begins.
    """
    package, file = FILES[config]
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is a dependency of this project"
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == config)
    found: dict[str, Any] = {}
    for base in body.bases:
        assert isinstance(base, ast.Name), f"{config} derives from {ast.unparse(base)}"
        found |= trainer_types(base.id)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_argument(node.value):
            found[node.target.id] = eval(ast.unparse(node.annotation), {}, _Names())  # noqa: S307 - trl's own source
    return found


def _is_argument(value: ast.expr | None) -> bool:
    """Whether a dataclass takes the field as an argument."""
    words = value.keywords if isinstance(value, ast.Call) else []
    return not any(word.arg == "init" and ast.unparse(word.value) == "False" for word in words)


def check_trainer_key(key: str, value: Any, config: str = "SFTConfig") -> Any:
    """Validate one key of `trainer` against one of trl's configs; returns the value in the field's type.

    Raises:
        ValueError: the key is unknown, the recipe sets it elsewhere, or the value is of another type.
    """
    types = trainer_types(config)
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
