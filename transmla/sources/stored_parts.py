"""Parts of a model from its safetensors files, through transformers' own loading code."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from transmla.errors import RecipeError
from transmla.sources.layered_model import EMBEDDING, HEAD, LayeredModel, model_without_weights
from transmla.sources.quiet_loading import quiet_loading
from transmla.sources.safetensors_header import DamagedFileError, read_header
from transmla.sources.weight_files import AGAIN, weight_files
from transmla.sources.weights import misfit

IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class StoredParts:
    """Reads parts of a directory's weights. A file is mapped while one part of it is read, so that memory holds no more
    of it."""

    def __init__(self, folder: Path, key: str) -> None:
        """key: for errors.

        Raises:
            RecipeError: a file is not there or damaged.
        """
        self.folder, self.key = folder, key
        self.parts: dict[str, dict[str, Path]] = {}  # names and their files, by layer or by module
        for file in weight_files(folder, key):
            try:
                header = read_header(file)
            except DamagedFileError as error:
                raise RecipeError(key, f"{error}; {AGAIN}") from None
            for name in header:
                self.parts.setdefault(_part_of(name), {})[name] = file

    def fill(self, model: PreTrainedModel, part: str, device: torch.device) -> None:
        """Put the weights of a part into the model, in its dtype, on the device.

        Raises:
            RecipeError: they are not those of the configuration.
        """
        names, as_embedding = self.parts.get(_part_of(f"{part}."), {}), False
        tied = model.config.tie_word_embeddings and part == EMBEDDING
        if tied and not names:  # saved under the other name of the one weight
            names, as_embedding = self.parts.get(HEAD, {}), True
        with ExitStack() as stack, quiet_loading():
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(names.values())}
            state: dict[str, Any] = {name: opened[file].get_slice(name) for name, file in names.items()}
            if as_embedding:
                state = {f"{EMBEDDING}.weight": value for value in state.values()}
            mapping: Any = get_model_conversion_mapping(model)  # typed as a list of their base class
            plan = LoadStateDictConfig(
                device_map={"": device}, dtype=model.dtype, ignore_mismatched_sizes=True, weight_mapping=mapping
            )
            info, _ = convert_and_load_state_dict_in_model(model, state, plan)
        model._adjust_missing_and_unexpected_keys(info)
        found = info.to_dict() | {"conversion_errors": info.conversion_errors}
        found["missing_keys"] = {name for name in found["missing_keys"] if name.startswith(f"{part}.")}
        if reason := misfit(found):
            raise RecipeError(
                self.key, f"the weights of {self.folder} do not fit its config.json: {reason}; make that folder again"
            )


def _part_of(name: str) -> str:
    """The part that a stored tensor belongs to: `layers.N`, or the last module of its name."""
    inside = IN_LAYER.search(name)
    return f"layers.{inside[1]}" if inside else name.rpartition(".")[0].rpartition(".")[2]


def stored_model(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, key: str, *, source: bool = True
) -> LayeredModel:
    """A directory's model, of which one part is in memory at a time. key, source: as of `LayeredModel`."""
    model = model_without_weights(config, dtype, device)
    return LayeredModel(model, StoredParts(folder, key), device, key, source=source)
