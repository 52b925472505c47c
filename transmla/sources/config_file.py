"""What of a config.json can be refused as it stands there, before transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transmla.errors import RecipeError

CONFIG = "config.json"

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def check_counts(fields: Mapping[str, Any], key: str) -> None:
    """Check dimensions, which transformers may divide by while it reads them. fields: of a config.json.

    Raises:
        RecipeError: one of them is below 1.
    """
    for name in COUNTS:
        value = fields.get(name)
        if isinstance(value, int) and value < 1:
            raise RecipeError(key, f"no model has {name} {value}; correct its configuration")


def one_line(error: Exception, length: int = 200) -> str:
    """What a library says of an error, on one line."""
    return " ".join(str(error).split())[:length].rstrip(" .,:;") or type(error).__name__


def read_config_file(folder: Path, key: str) -> dict[str, Any]:
    """The content of a model directory's config.json: what transformers would ask about, or pass over without a word,
    is refused. key: for errors.

    Raises:
        RecipeError: there is none, it is no JSON, names no model, or says that the weights are not a model's own.
    """
    file = folder / CONFIG
    if (folder / "adapter_config.json").is_file():
        raise RecipeError(
            key, f"{folder} is an adapter (adapter_config.json); merge it into its model, and name what that saves"
        )
    if not file.is_file():
        raise RecipeError(key, f"{folder} is no model directory: it has no config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(key, f"{file} is no JSON: {one_line(error)}; download it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise RecipeError(key, f"{file} names no model_type; it must be the config.json of a transformers model")
    check_counts(content, key)
    for name in ("quantization_config", "compression_config"):
        if content.get(name):
            method = content[name].get("quant_method", "") if isinstance(content[name], dict) else ""
            raise RecipeError(
                key,
                f"its weights are quantised ({name}{': ' * bool(method)}{method}); name the model that it was made of, "
                "or dequantise it (load it with transformers, model.dequantize(), save_pretrained)",
            )
    for name in ("per_layer_config", "transformers_weights"):
        if content.get(name):
            raise RecipeError(key, f"{file} has {name}, which is not supported; use a model without it")
    return content
