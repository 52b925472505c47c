"""Load a causal language model from a directory: all of it or none, or one part at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from transmla.errors import RecipeError
from transmla.families import default_kernel
from transmla.files import MANIFEST, damage
from transmla.sources.config import read_config
from transmla.sources.file_digests import read_digests
from transmla.sources.generation import NAME as GENERATION
from transmla.sources.generation import read_generation
from transmla.sources.kinds import cache_folder
from transmla.sources.layered_model import LayeredModel
from transmla.sources.quiet_loading import quiet_loading
from transmla.sources.stored_parts import stored_model
from transmla.sources.weight_files import read_headers
from transmla.sources.weight_values import check_numbers, check_tied
from transmla.sources.weights import misfit


def load_model(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load a student or an exported model in eval mode, with its family's attention kernel.

    Raises:
        RecipeError: a file is damaged, or the weights are not those of the configuration.
    """
    read_headers(folder, "output_dir", "delete that folder, to have it made again")
    return _load(folder, AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype, device, "output_dir")


def load_source(folder: Path, dtype: torch.dtype, device: str, key: str = "model.source") -> PreTrainedModel:
    """Load a source in eval mode, with its family's attention kernel, from a directory that `check_folder` accepts.

    Its generation configuration is in a form that can be saved. key: for errors.

    Raises:
        RecipeError: its weights are not those of its configuration, were changed in the cache, or are no numbers.
    """
    config = read_config(folder, key)
    _require_unchanged(folder, key)
    check_numbers(folder, config, dtype, key)
    return _load(folder, config, dtype, device, key, generation_config=read_generation(folder, config, key))


def stream_model(folder: Path, dtype: torch.dtype, device: str) -> LayeredModel:
    """A student or an exported model of which one part is in memory at a time.

    Raises:
        RecipeError: a file is damaged.
    """
    read_headers(folder, "output_dir", "delete that folder, to have it made again")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    student = stored_model(folder, config, dtype, torch.device(device), "output_dir", source=False)
    if (folder / GENERATION).is_file():
        student.model.generation_config = GenerationConfig.from_dict(json.loads((folder / GENERATION).read_text()))
    return student


def stream_source(folder: Path, dtype: torch.dtype, device: str, key: str = "model.source") -> LayeredModel:
    """A source of which one part is in memory at a time, from a directory that `check_folder` accepts.

    Values that are no numbers are refused when their part is read. key: for errors.

    Raises:
        RecipeError: its weights were changed in the cache, or head and embedding differ where they should be one.
    """
    config = read_config(folder, key)
    _require_unchanged(folder, key)
    check_tied(folder, config, key)
    source = stored_model(folder, config, dtype, torch.device(device), key)
    source.model.generation_config = read_generation(folder, config, key)
    return source


def _require_unchanged(folder: Path, key: str) -> None:
    """Refuse a model in the cache that is not what was written there."""
    if folder.parent == cache_folder() and (folder / MANIFEST).is_file() and (found := damage(folder, read_digests)):
        raise RecipeError(key, f"{folder} is damaged: {found}; delete it, the next run makes it again")


def _load(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: str, key: str, **options: Any
) -> PreTrainedModel:
    with quiet_loading(bar=True):  # what it would warn of is in the report, and refused below
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=default_kernel(config.model_type),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    model, report = loaded
    if reason := misfit(report):
        raise RecipeError(key, f"the weights of {folder} do not fit its config.json: {reason}; make that folder again")
    return model.to(device).eval()
