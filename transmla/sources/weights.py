"""Whether a directory's weights are those of its configuration: names, shapes and number formats, before any is loaded.

A checkpoint's names are not always the model's (Mixtral's experts are one file each and one tensor in memory; a model
saved without its head has no prefix). So the headers are given to transformers' own loading code as tensors without
memory, and its report says what is missing, left over, or of another shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from transmla.errors import RecipeError
from transmla.sources.config_values import skeleton
from transmla.sources.quiet_loading import quiet_loading
from transmla.sources.safetensors_header import FLOATS, Stored
from transmla.sources.weight_files import AGAIN, check_headers, listed


def check_weights(folder: Path, config: PretrainedConfig, key: str) -> None:
    """Check the weights of a directory against its configuration. key: for errors.

    Raises:
        RecipeError: files are missing or damaged, tensors are missing, left over, of another shape, or quantised.
    """
    stored = check_headers(folder, key)
    report = _loading_report(skeleton(config, key), stored)
    if reason := misfit(report):
        raise RecipeError(key, f"the weights of {folder} do not fit its config.json: {reason}; {AGAIN}")


def _loading_report(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """What transformers would say after loading: missing, unexpected and mismatched keys, and failed conversions."""
    state = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, FLOATS[tensor.dtype][0]), device="meta")
        for name, tensor in stored.items()
    }
    mapping: Any = get_model_conversion_mapping(model)  # typed as a list of their base class
    plan = LoadStateDictConfig(
        device_map={"": torch.device("meta")},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        weight_mapping=mapping,
    )
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    with quiet_loading():
        info, _ = convert_and_load_state_dict_in_model(model, state, plan)
    model._adjust_missing_and_unexpected_keys(info)
    for target, source in tied.items():  # one of two tied weights is enough
        if not {target, source} <= info.missing_keys:
            info.missing_keys -= {target, source}
    return info.to_dict() | {"conversion_errors": info.conversion_errors}


# What transformers' DeepSeek fills with zeros where a file lacks it, as exports with experts do.
FILLED = "mlp.gate.e_score_correction_bias"


def misfit(report: Mapping[str, Any]) -> str | None:
    """What a loading report has against a checkpoint, in words; None: nothing."""
    shapes = [f"{name} ({_size(have)} stored, {_size(want)} wanted)" for name, have, want in report["mismatched_keys"]]
    parts = {
        "missing": [name for name in report["missing_keys"] if not name.endswith(FILLED)],
        "left over": report["unexpected_keys"],
        "of another shape": shapes,
        "not convertible": report.get("conversion_errors") or (),
    }
    return "; ".join(f"{listed(names)} {word}" for word, names in parts.items() if names) or None


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
