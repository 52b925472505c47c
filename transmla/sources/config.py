"""The source's configuration, read without its weights and made fit for every later save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from transmla.errors import RecipeError
from transmla.families import FAMILIES
from transmla.recipe.model_source import ModelSource
from transmla.sources import hub
from transmla.sources.config_file import CONFIG, check_counts, one_line, read_config_file
from transmla.sources.config_values import check_values
from transmla.sources.gguf_header import check_gguf
from transmla.sources.kinds import check_there, kind_of
from transmla.sources.quiet_loading import quiet_loading

# Of a configuration: what would load code or kernels from a hub, and what a save would refuse.
RESET = {"_attn_implementation": None, "_experts_implementation": None, "output_attentions": False}


def source_config(section: ModelSource, key: str = "model") -> PretrainedConfig:
    """Configuration of the source without its weights: from a local directory, else from the recipe's facts, else
    from the hub. key: of the section in the recipe.

    Raises:
        RecipeError: it cannot be had, its facts are no configuration, or no model has such dimensions.
    """
    kind = kind_of(section.source)
    _refuse_idle_pins(section, kind, key)
    check_there(section.source, key)
    if kind == "directory":
        config = read_config(Path(section.source).expanduser(), f"{key}.source")
        check_facts(section, config, key)
        return config
    if kind == "random" and section.config is None:
        raise RecipeError(f"{key}.config", "a random model needs its architecture; give model.config")
    if kind == "gguf":
        check_gguf(Path(section.source).expanduser(), f"{key}.source")
    if section.config is not None:
        return _from_facts(section.config, f"{key}.config")
    if kind == "gguf":
        return read_gguf_config(Path(section.source).expanduser(), f"{key}.source")
    if kind == "pypi":
        raise RecipeError(f"{key}.config", "a plan does not download packages; give the architecture as model.config")
    return read_config(hub.config_folder(section, key), f"{key}.source")


def _refuse_idle_pins(section: ModelSource, kind: str, key: str) -> None:
    """A pin that would not be looked at must not look as if it were."""
    if section.sha256 is not None and kind not in ("gguf", "pypi"):
        raise RecipeError(f"{key}.sha256", "it is the digest of a GGUF, and the source is none; leave it out")
    if section.revision is not None and kind != "hub":
        raise RecipeError(f"{key}.revision", f"only a hub has revisions, {section.source} is none; leave it out")


def read_config(folder: Path, key: str) -> PretrainedConfig:
    """The configuration of a directory; no code of it is run, and nobody is asked whether to. key: for errors.

    Raises:
        RecipeError: there is none, it is broken, of code of its own, of quantised weights, or impossible.
    """
    content = read_config_file(folder, key)
    _check_model_type(content, key)
    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a wrong field
        raise RecipeError(key, f"cannot read {folder / CONFIG}: {one_line(error)}; correct it") from None
    return _made_fit(config, key)


def read_gguf_config(file: Path, key: str) -> PretrainedConfig:
    """The configuration in the header of a GGUF.

    Raises:
        RecipeError: it has none that transformers can read.
    """
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # gguf and transformers raise many kinds for a broken header
        raise RecipeError(key, f"{file} is no GGUF that can be read: {one_line(error)}; download it again") from None
    return _made_fit(config, key)


def _check_model_type(content: dict[str, Any], key: str) -> None:
    kind = content["model_type"]
    if kind not in CONFIG_MAPPING:
        reason = "its code would have to be run, which never happens" if "auto_map" in content else "it is unknown"
        raise RecipeError(
            key, f"no adapter for model type {kind!r}: {reason}; there are: {', '.join(sorted(FAMILIES))}"
        )


def _made_fit(config: PretrainedConfig, key: str) -> PretrainedConfig:
    """The configuration as every later stage, save and reader takes it."""
    for name, value in RESET.items():
        setattr(config, name, value)
    if isinstance(config.pad_token_id, int) and config.pad_token_id < 0:  # the first Llamas' way to say none
        config.pad_token_id = None
    if config.dtype is not None and not getattr(config.dtype, "is_floating_point", False):
        config.dtype = None
    check_values(config, key)
    return config


def _from_facts(facts: dict[str, Any], key: str) -> PretrainedConfig:
    """The configuration that a recipe describes."""
    kind = facts.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise RecipeError(
            f"{key}.model_type", f"no adapter for model type {kind!r}; there are: {', '.join(sorted(FAMILIES))}"
        )
    check_counts(facts, key)
    try:
        config = AutoConfig.for_model(**facts)
    except Exception as error:  # transformers raises many kinds for a wrong field
        raise RecipeError(key, f"not a configuration: {one_line(error)}; correct it") from None
    return _made_fit(config, key)


def check_facts(section: ModelSource, config: PretrainedConfig, key: str = "model") -> None:
    """Compare the recipe's architecture facts with the real configuration once that is there.

    Raises:
        RecipeError: a fact is wrong, so the plan was.
    """
    real = config.to_dict()
    for name, value in (section.config or {}).items():
        if name in real and real[name] != value and name not in ("rope_parameters",):
            raise RecipeError(
                f"{key}.config.{name}", f"the recipe says {value}, the model has {real[name]}; correct it"
            )
