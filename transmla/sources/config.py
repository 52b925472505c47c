"""The source's configuration, read without its weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource
from transmla.sources.kinds import kind_of


def source_config(section: ModelSource) -> PretrainedConfig:
    """Configuration of the source without its weights: from a local directory, else from the recipe's facts, else
    from the hub.

    Raises:
        RecipeError: it cannot be had, or its facts are no configuration.
    """
    kind = kind_of(section.source)
    if kind == "directory":
        folder = Path(section.source).expanduser()
        if not (folder / "config.json").is_file():
            raise RecipeError("model.source", f"{folder} is no model directory: it has no config.json")
        return _read_config(folder, section.source)
    if kind == "gguf" and not Path(section.source).expanduser().is_file():
        raise RecipeError("model.source", f"no such file: {section.source}; correct the path")
    if kind == "random" and section.config is None:
        raise RecipeError("model.config", "a random model needs its architecture; give model.config")
    if section.config is not None:
        facts = dict(section.config)
        try:
            return AutoConfig.for_model(facts.pop("model_type"), **facts)
        except Exception as error:  # transformers raises many kinds for a wrong field
            raise RecipeError("model.config", f"not a configuration: {' '.join(str(error).split())[:200]}") from None
    if kind == "gguf":
        path = Path(section.source).expanduser()
        return _read_config(path.parent, section.source, gguf_file=path.name)
    return _read_config(section.source, section.source, revision=section.revision)


def _read_config(where: str | Path, name: str, **options: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError) as error:  # not there; not an architecture that transformers knows
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(
            "model.source", f"cannot read {name}: {reason}; correct the name, or give the architecture as model.config"
        ) from None


def check_facts(section: ModelSource, config: PretrainedConfig) -> None:
    """Compare the recipe's architecture facts with the real configuration once that is there.

    Raises:
        RecipeError: a fact is wrong, so the plan was.
    """
    real = config.to_dict()
    for name, value in (section.config or {}).items():
        if name in real and real[name] != value and name not in ("rope_parameters",):
            raise RecipeError(
                f"model.config.{name}", f"the recipe says {value}, the model has {real[name]}; correct it"
            )
