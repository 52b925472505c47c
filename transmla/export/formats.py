"""Which format a student is exported in: a stock DeepSeek-V3 checkpoint where that can express it, else its own
class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.export.deepseek_config import deepseek_config
from transmla.export.dimensions import export_dimensions
from transmla.export.engines import Reading, notes_of, own_features, readings_of, require_engines, stock_features
from transmla.export.expressible import blocking_dtype, blocking_feature
from transmla.modeling.config_facts import latent_heads
from transmla.recipe.schema import Export

DEEPSEEK = "deepseek_v3"


@dataclass(frozen=True)
class Format:
    """name: the exported config.json's model type. reason: why it is not DeepSeek's, or None. readings: how serving
    engines read it. notes: what a user has to know before serving it."""

    name: str
    reason: str | None = None
    readings: tuple[Reading, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def stock(self) -> bool:
        """Whether stock transformers loads the checkpoint."""
        return self.name == DEEPSEEK

    @property
    def readers(self) -> list[str]:
        """Engines that read it rightly."""
        return [reading.engine for reading in self.readings if reading.reads]

    def serving(self) -> dict[str, Any]:
        """What a checkpoint's metadata says of engines: `notes`, and by engine what was found."""
        return {
            "notes": list(self.notes),
            "engines": {reading.engine: reading.describe() for reading in self.readings},
        }

    def describe(self, section: Export) -> str:
        """One line for a plan and a log."""
        if self.stock:
            return f"{self.name}, {section.layout} layout, {section.dtype}"
        why = f", because {self.reason}" if self.reason else ""
        return f"{self.name}, {section.dtype}: the student's own class, which `import transmla` loads{why}"


def choose_format(section: Export, student: PretrainedConfig, dtype: torch.dtype) -> Format:
    """Decide from configurations alone.

    Args:
        dtype: what the student is stored in.

    Raises:
        RecipeError: `deepseek_v3` was asked for and cannot express the student; the format of its numbers is too small;
            an engine that `export.engines` names would not read it.
    """
    reason = blocking_feature(student)
    if section.format == "student":
        stock = readings_of(_stock_features(section, student, dtype)) if reason is None else ()
        better = bool(stock) and all(reading.reads for reading in stock if reading.engine in section.engines)
        ways = ("use export.format=auto, which writes a stock checkpoint that they read",) if better else ()
        return _read_by(section, Format(student.model_type), own_features(student), ways)
    if reason is not None:
        if section.format == DEEPSEEK:
            raise RecipeError(
                "export.format", f"a stock checkpoint cannot express this model: {reason}; use auto or student"
            )
        return _read_by(section, Format(student.model_type, reason), own_features(student))
    stored = dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    if (reason := blocking_dtype(student, stored)) is not None:
        raise RecipeError("dtype" if section.dtype == "auto" else "export.dtype", reason)
    try:
        export_dimensions(student, section.layout)
    except ValueError as error:
        raise RecipeError("export.layout", str(error).removeprefix("export.layout: ")) from None
    found = _read_by(section, Format(DEEPSEEK), _stock_features(section, student, stored))
    return replace(found, notes=(*found.notes, *latent_notes(student)))


def latent_notes(student: PretrainedConfig) -> tuple[str, ...]:
    """What a user has to know of a checkpoint with several latents."""
    if (latents := latent_heads(student)) == 1:
        return ()
    return (
        f"{latents} latents, each for its share of the heads: engines read one block-sparse kv_b, and with tensor "
        "parallelism keep all latents on every rank; what an engine needs to keep a rank's own alone is in "
        "transmla.json (kv_b_blocks)",
    )


def _stock_features(section: Export, student: PretrainedConfig, dtype: torch.dtype) -> tuple[str, ...]:
    layout = "compact" if section.format == "student" else section.layout
    linear_norm = blocking_dtype(student, torch.float16) is not None
    return stock_features(deepseek_config(student, layout, dtype), linear_norm=linear_norm)


def _read_by(section: Export, chosen: Format, features: Sequence[str], ways: Sequence[str] = ()) -> Format:
    """The format with what engines make of it.

    Raises:
        RecipeError: one that the recipe names would not read it.
    """
    readings = readings_of(features)
    if section.engines != "auto":
        require_engines(section.engines, features, readings, ways=ways)
    return replace(chosen, readings=readings, notes=notes_of(features, readings))
