"""Bytes that a run needs on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import PretrainedConfig

from transmla.convert.refit import stream_bytes
from transmla.hardware import require_disk
from transmla.plan.memory import Sizes
from transmla.recipe.schema import Recipe


def bytes_on_disk(recipe: Recipe, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that a whole run needs at its fullest: every model, the teacher's states, one stage's checkpoints, and what
    the teacher writes or says: its text, as it was drawn and as rows, and recorded distributions."""
    width = torch.finfo(dtype).bits // 8
    models = (1 + len(recipe.recover)) * width * sizes.student
    export_width = (
        width if recipe.export.dtype == "auto" else torch.finfo(getattr(torch, recipe.export.dtype)).bits // 8
    )
    exported = export_width * (sizes.student + config.vocab_size * config.hidden_size)  # the head is never tied
    states = len(recipe.evaluate.data) * (recipe.evaluate.tokens + config.vocab_size) * config.hidden_size * width
    checkpoints = 0
    for stage in recipe.recover:
        trained = sizes.trained(stage)
        one = 12 * trained + width * (sizes.student - trained)  # float32 masters, two moments; the rest as it is
        kept = int(stage.trainer.get("save_total_limit") or 2) + 1  # the newest is whole before the oldest goes
        checkpoints = max(checkpoints, kept * one)
    return models + exported + states + checkpoints + _written_bytes(recipe) + _recorded_bytes(recipe)


def _written_bytes(recipe: Recipe) -> int:
    """Rough bytes of `write`, at most: a token is some 6 as a number, there twice, and 5 as text. How many problems a
    data set has is not known here: its traces count where `limit` says."""
    tokens = 0
    for entry in recipe.write:
        if entry.kind == "text":
            tokens += entry.tokens
        else:
            size = entry.problems.size if entry.problems.data is None else entry.limit or 0
            tokens += entry.samples * entry.max_new_tokens * min(size, entry.limit or size)
    return 17 * tokens


def _recorded_bytes(recipe: Recipe) -> int:
    """Rough bytes of recordings below the output directory: deflated, an entry takes 2.5 to 3 in 16 bits (README)."""
    stages = [stage for stage in recipe.recover if stage.kind == "distill" and stage.teacher == "recorded"]
    width = {"float16": 3, "bfloat16": 3, "float32": 5}
    return sum(
        stage.tokens * stage.record.top_k * width[stage.record.dtype] for stage in stages if stage.record.folder is None
    )


def check_disk(recipe: Recipe, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype, output: Path) -> None:
    """Check that what a run needs is free, beside what is below `output` already.

    Raises:
        RecipeError: it is not.
    """
    there = sum(file.stat().st_size for file in output.rglob("*.safetensors")) if output.is_dir() else 0
    missing = bytes_on_disk(recipe, sizes, config, dtype) - there
    require_disk(output, max(missing, 0))
    if recipe.convert.refit:
        streams = stream_bytes(recipe.convert.calibration.tokens, config.hidden_size, dtype)
        require_disk(Path(tempfile.gettempdir()), streams, "convert.refit")
