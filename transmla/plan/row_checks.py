"""Rows of recovery stages against the model's positions and the kind of data."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.recipe.budget import ROW_LENGTH
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import AnyStage, OnPolicy


def check_rows(recipe: Recipe, config: PretrainedConfig, kinds: dict[str, str]) -> None:
    """Check the rows of every stage whose data was looked at. kinds: of rows, by the key of their list.

    Raises:
        RecipeError: they are longer than the model reads, or the trainer asks for what the data does not have.
    """
    for index, stage in enumerate(recipe.recover):
        if f"recover.{index}.data" in kinds:
            _check_rows(stage, f"recover.{index}.trainer", kinds[f"recover.{index}.data"], config)


def _check_rows(stage: AnyStage, key: str, kind: str, config: PretrainedConfig) -> None:
    """Rows within the model's positions, and losses that the kind of data has."""
    trainer, positions = stage.trainer, config.max_position_embeddings
    if isinstance(stage, OnPolicy):
        return
    if stage.train == "lora" and stage.lora.r > config.hidden_size:
        raise RecipeError(
            f"{key.removesuffix('trainer')}lora.r", f"{stage.lora.r} is above the {config.hidden_size} of the model"
        )
    longest, unit = trainer.get("max_length", ROW_LENGTH), trainer.get("pad_to_multiple_of")
    if longest > positions:
        raise RecipeError(
            f"{key}.max_length", f"rows have {longest} tokens, the model {positions} positions; use at most that"
        )
    if isinstance(unit, int) and -(-longest // unit) * unit > positions:
        raise RecipeError(
            f"{key}.pad_to_multiple_of",
            f"{longest} filled up to a multiple of {unit} is above the {positions} positions",
        )
    if trainer.get("padding_free") and not trainer.get("packing", True):
        raise RecipeError(f"{key}.padding_free", "rows that are not packed may have any length; leave it out, or pack")
    if trainer.get("completion_only_loss") and kind != "completion":
        raise RecipeError(
            f"{key}.completion_only_loss", f"the data is {kind}, it has no prompt and completion; leave it out"
        )
    if trainer.get("assistant_only_loss") and kind == "text":
        raise RecipeError(f"{key}.assistant_only_loss", "the data is text, nobody speaks in it; leave it out")
    template = trainer.get("chat_template_path")
    if template is not None and not Path(template).is_file():
        raise RecipeError(f"{key}.chat_template_path", f"no such file: {template}; correct the path")
