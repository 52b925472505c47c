"""Whether a directory's weights are those of its configuration: names, shapes and number formats, before any is loaded.

A checkpoint's names are not always the model's (Mixtral's experts are one file each and one tensor in memory; a model
saved without its head has no prefix). So the headers are given to transformers' own loading code as tensors without
memory, and its report says what is missing, left over, or of another shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from transmla.errors import RecipeError
from transmla.sources.config_values import skeleton
from transmla.sources.safetensors_header import FLOATS, DamagedFileError, Stored, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth")
AGAIN = "download or save the model again"


def check_weights(folder: Path, config: PretrainedConfig, key: str) -> None:
    """Check the weights of a directory against its configuration. key: for errors.

    Raises:
        RecipeError: files are missing or damaged, tensors are missing, left over, of another shape, or quantised.
    """
    stored = read_headers(folder, key)
    quantised = [name for name, tensor in stored.items() if tensor.dtype not in FLOATS]
    if quantised:
        kinds = ", ".join(sorted({stored[name].dtype for name in quantised}))
        raise RecipeError(
            key, f"{listed(quantised)} of {folder} are quantised ({kinds}); name the model that it was made of"
        )
    report = _loading_report(skeleton(config, key), stored)
    if reason := misfit(report):
        raise RecipeError(key, f"the weights of {folder} do not fit its config.json: {reason}; {AGAIN}")


def weight_files(folder: Path, key: str, remedy: str = AGAIN) -> list[Path]:
    """The files that hold a directory's weights, as transformers chooses them. key, remedy: for errors.

    Raises:
        RecipeError: there are none in safetensors, or the index is broken.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        try:
            return [folder / name for name in indexed_files((folder / INDEX).read_bytes())]
        except ValueError as error:
            raise RecipeError(key, f"{folder / INDEX}: {error}; {remedy}") from None
    raise RecipeError(key, f"{folder} {without_weights(path.name for path in folder.iterdir())}")


def indexed_files(content: bytes) -> list[str]:
    """The files that an index names, each a relative path below its folder.

    Raises:
        ValueError: it is no index.
    """
    try:
        files = sorted(set(json.loads(content)["weight_map"].values()))
        paths = [PurePosixPath(file) for file in files]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is no index of weights") from None
    for path in paths:
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise ValueError(f"it names {str(path)!r}, which is no safetensors file of its folder")
    if not files:
        raise ValueError("it names no file")
    return files


def without_weights(names: Iterable[str]) -> str:
    """Why a folder or repository with these files, which has no weights in safetensors, is refused."""
    names = list(names)
    if pickled := sorted(name for name in names if name.endswith(PICKLED)):
        return (
            f"has pickled weights alone ({pickled[0]}), which may hold code and are not read; convert them to "
            "safetensors first: load them with transformers, save_pretrained"
        )
    if packed := sorted(name for name in names if name.endswith(".gguf")):
        return f"has no safetensors weights, but a GGUF; give the path of a file such as {packed[0]} instead"
    if other := sorted(name for name in names if name.endswith(".safetensors")):
        return f"has neither {SINGLE} nor {INDEX} (but {other[0]}); save the model with transformers"
    return f"has no weights: neither {SINGLE} nor {INDEX}; {AGAIN}"


def read_headers(folder: Path, key: str, remedy: str = AGAIN) -> dict[str, Stored]:
    """All tensors of a directory by name. key, remedy: for errors.

    Raises:
        RecipeError: a file is not there or damaged, or two hold the same tensor.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder, key, remedy):
        try:
            header = read_header(file)
        except DamagedFileError as error:
            raise RecipeError(key, f"{error}; {remedy}") from None
        if twice := found.keys() & header.keys():
            raise RecipeError(key, f"{file} repeats {listed(twice)} of another file; {remedy}")
        found |= header
    return found


def _loading_report(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """What transformers would say after loading: missing, unexpected and mismatched keys, and failed conversions."""
    state = {
        name: torch.empty(tensor.shape, dtype=FLOATS[tensor.dtype], device="meta") for name, tensor in stored.items()
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


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bar, where nothing is loaded or only a part."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def misfit(report: Mapping[str, Any]) -> str | None:
    """What a loading report has against a checkpoint, in words; None: nothing."""
    shapes = [f"{name} ({_size(have)} stored, {_size(want)} wanted)" for name, have, want in report["mismatched_keys"]]
    parts = {
        "missing": report["missing_keys"],
        "left over": report["unexpected_keys"],
        "of another shape": shapes,
        "not convertible": report.get("conversion_errors") or (),
    }
    return "; ".join(f"{listed(names)} {word}" for word, names in parts.items() if names) or None


def listed(names: Iterable[str], most: int = 3) -> str:
    """How many names there are, and the first of them."""
    names = sorted(names)
    more = ", ..." if len(names) > most else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(names[:most])}{more})"


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
