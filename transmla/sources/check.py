"""Everything that can be seen of a model directory before its weights are loaded."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from transmla.recipe.model_source import ModelSource
from transmla.sources.config import read_config
from transmla.sources.config_values import skeleton
from transmla.sources.generation import read_generation
from transmla.sources.kinds import kind_of
from transmla.sources.tokenizer import check_tokenizer
from transmla.sources.weights import check_weights


def check_planned(section: ModelSource, config: PretrainedConfig, key: str) -> None:
    """What can be checked of a source before anything is downloaded: all of a directory, else the architecture.

    Args:
        config: what `source_config` found. key: of the section in the recipe, for errors.

    Raises:
        RecipeError: its files do not fit one another, or transformers builds no model of its configuration.
    """
    if kind_of(section.source) == "directory":
        check_folder(Path(section.source).expanduser(), f"{key}.source")
    else:
        check_architecture(section, config, key)


def check_architecture(section: ModelSource, config: PretrainedConfig, key: str) -> None:
    """The part of `check_planned` that takes the model's class: the weights of a directory, else the architecture.

    Raises:
        RecipeError: as there.
    """
    if kind_of(section.source) == "directory":
        check_weights(Path(section.source).expanduser(), config, f"{key}.source")
    else:
        skeleton(config, f"{key}.{'source' if section.config is None else 'config'}")


def check_folder(folder: Path, key: str) -> PretrainedConfig:
    """The configuration of a directory whose files fit one another. key: of the source in the recipe, for errors.

    Raises:
        RecipeError: configuration, weights, generation configuration or tokenizer cannot be used, with the reason.
    """
    config = read_config(folder, key)
    read_generation(folder, config, key)
    check_weights(folder, config, key)
    check_tokenizer(folder, key)
    return config
