"""Bytes that a run needs on disk."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import PretrainedConfig

from transmla.convert.refit import stream_bytes
from transmla.data.definition import find_definition, local_files
from transmla.hardware import disk_of, require_disk
from transmla.plan.memory import Sizes, snapshot_bytes
from transmla.recipe.budget import steps_of
from transmla.recipe.data_lists import Part
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import AnyStage
from transmla.recipe.writing import Solve, Traces
from transmla.recover.arguments import DEFAULTS


@dataclass(frozen=True)
class Bytes:
    """Bytes of what a run writes. model: a student. states: of the teacher, with which models are compared.
    checkpoints: of every recovery stage, while it trains. written: text and replies. recorded: distributions."""

    model: int
    exported: int
    states: int
    checkpoints: list[int]
    written: int
    recorded: int

    @property
    def total(self) -> int:
        """Of a whole run at its fullest: one stage's checkpoints at a time."""
        models = (1 + len(self.checkpoints)) * self.model + self.exported
        return models + self.states + max(self.checkpoints, default=0) + self.written + self.recorded


def bytes_by_artifact(recipe: Recipe, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype) -> Bytes:
    """What every part of a run takes."""
    width = torch.finfo(dtype).bits // 8
    export_width = (
        width if recipe.export.dtype == "auto" else torch.finfo(getattr(torch, recipe.export.dtype)).bits // 8
    )
    states = len(recipe.evaluate.data) * (recipe.evaluate.tokens + config.vocab_size) * config.hidden_size * width
    return Bytes(
        model=width * sizes.student,
        exported=export_width * (sizes.student + _added(recipe, config)),
        states=states,
        checkpoints=[_checkpoint_bytes(stage, sizes) for stage in recipe.recover],
        written=_written_bytes(recipe),
        recorded=_recorded_bytes(recipe),
    )


def _added(recipe: Recipe, config: PretrainedConfig) -> int:
    """Numbers that an export has beside its student's: a head, which is never tied, and shared experts of zeros."""
    head = config.vocab_size * config.hidden_size
    if recipe.convert.router == "keep":
        return head
    return head + 3 * config.num_hidden_layers * config.hidden_size * config.intermediate_size


def bytes_on_disk(recipe: Recipe, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that a whole run needs at its fullest, when nothing of it is there yet."""
    return bytes_by_artifact(recipe, sizes, config, dtype).total


def _checkpoint_bytes(stage: AnyStage, sizes: Sizes) -> int:
    """Of all checkpoints of a stage that are there at a time."""
    trainer = stage.trainer
    if trainer.get("save_strategy") == "no":
        return 0
    steps, every = steps_of(stage, 1), float(trainer.get("save_steps", DEFAULTS["save_steps"]))
    saved = math.ceil(1 / every) if every < 1 else steps // int(every) + 1
    kept = trainer.get("save_total_limit", DEFAULTS["save_total_limit"])
    there = saved if kept is None else min(saved, kept + 1)  # the newest is whole before the oldest goes
    return there * snapshot_bytes(stage, sizes)


def _written_bytes(recipe: Recipe) -> int:
    """Rough bytes of `write` and of replies to `evaluate.solve`, at most: a token is some 6 as a number, there twice,
    and 5 as text. How many problems a data set has is not known here: its replies count where `limit` says."""
    tokens = sum(entry.tokens if entry.kind == "text" else _tokens_of_replies(entry) for entry in recipe.write)
    models = 3 + bool(recipe.recover)  # teacher, converted and exported answer, and recovered where there is one
    replies = models * sum(_tokens_of_replies(entry) for entry in recipe.evaluate.solve)
    return 17 * tokens + 12 * replies


def _tokens_of_replies(entry: Traces | Solve) -> int:
    size = entry.problems.size if entry.problems.data is None else entry.limit or 0
    return entry.samples * entry.max_new_tokens * min(size, entry.limit or size)


def _recorded_bytes(recipe: Recipe) -> int:
    """Rough bytes of recordings below the output directory: deflated, an entry takes 2.5 to 3 in 16 bits (README)."""
    stages = [stage for stage in recipe.recover if stage.kind == "distill" and stage.teacher == "recorded"]
    width = {"float16": 3, "bfloat16": 3, "float32": 5}
    return sum(
        stage.tokens * stage.record.top_k * width[stage.record.dtype] for stage in stages if stage.record.folder is None
    )


@dataclass(frozen=True)
class Made:
    """One artifact that a run is to make. new: its bytes. old: of what it replaces. beside: of what is there only while
    it is made."""

    new: int
    old: int = 0
    beside: int = 0


def peak_of(artifacts: Iterable[Made]) -> int:
    """Most bytes that making artifacts in this order takes beside what is there: each replaces an older one when it is
    whole, not before."""
    taken = most = 0
    for artifact in artifacts:
        most = max(most, taken + artifact.beside + artifact.new)
        taken += artifact.new - artifact.old
    return most


# Bytes that Datasets' cache takes for a byte of text: token ids and labels, rows of them, packed ones and their order.
CACHED = 4.6


def cache_of_text() -> Path:
    """Where Datasets keeps tokens."""
    return Path(datasets.config.HF_DATASETS_CACHE)


def cache_bytes(recipe: Recipe) -> int:
    """Rough bytes of the tokens of all local text that is trained on; every dataset is kept once, whichever stages read
    it. Of one that is cut to a number of rows, and of a hub's, the size is not known here."""
    files: set[Path] = set()
    for index, stage in enumerate(recipe.recover):
        for part in stage.data:
            name = part if isinstance(part, str) else part.name
            if name.startswith("@") or (isinstance(part, Part) and part.rows is not None):
                continue
            key = f"recover.{index}.data"
            definition, folder = find_definition(name, key)
            files |= {file.resolve() for file in local_files(definition, folder, key)}
    return int(CACHED * sum(file.stat().st_size for file in files))


def _check_cache(recipe: Recipe, output: Path, beside: int) -> None:
    """Room for the tokens, beside what goes into the output directory where both are on one disk. What the cache holds
    may be these tokens already, so that only what is beyond it is asked for."""
    cache, needed = cache_of_text(), cache_bytes(recipe)
    if needed < LITTLE:
        return
    there = sum(file.stat().st_size for file in cache.rglob("*.arrow")) if cache.is_dir() else 0
    same = disk_of(cache) == disk_of(output)
    require_disk(cache, max(0, needed - there) + (beside if same else 0), "recover.0.data")


LITTLE = 2**28  # bytes of cache that are not worth a look


def check_disk(
    recipe: Recipe, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype, output: Path, *, streamed: bool
) -> None:
    """Check that what a run needs is free, beside what is below `output` already. streamed: whether the conversion is.

    Which of that is still good, and which stands until its replacement is whole, is seen later (transmla.run.room).

    Raises:
        RecipeError: it is not.
    """
    there = sum(file.stat().st_size for file in output.rglob("*.safetensors")) if output.is_dir() else 0
    needed = bytes_by_artifact(recipe, sizes, config, dtype)
    parts = {"evaluate.tokens": needed.states, "write": needed.written, "recover": needed.recorded}
    blamed = next((key for key, size in parts.items() if size > needed.total / 2), "output_dir")
    require_disk(output, needed.total - there, blamed)
    _check_cache(recipe, output, max(0, needed.total - there))
    if recipe.convert.refit or streamed:
        streams = stream_bytes(recipe.convert.calibration.tokens, config.hidden_size, dtype)
        require_disk(
            Path(tempfile.gettempdir()), streams, "convert.calibration.tokens" if streamed else "convert.refit"
        )
