"""Which format a student is exported in: a stock DeepSeek-V3 checkpoint where that can express it, else its own
class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.export.dimensions import export_dimensions
from transmla.export.expressible import blocking_dtype, blocking_feature, native_engine_notes
from transmla.recipe.schema import Export

DEEPSEEK = "deepseek_v3"


@dataclass(frozen=True)
class Format:
    """name: the exported config.json's model type. reason: why it is not DeepSeek's, or None. notes: what a user has to
    know before serving it."""

    name: str
    reason: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def stock(self) -> bool:
        """Whether stock transformers loads the checkpoint."""
        return self.name == DEEPSEEK

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
        RecipeError: `deepseek_v3` was asked for and cannot express the student; the format of its numbers is too small.
    """
    if section.format == "student":
        return Format(student.model_type)
    reason = blocking_feature(student)
    if reason is not None:
        if section.format == DEEPSEEK:
            raise RecipeError(
                "export.format", f"a stock checkpoint cannot express this model: {reason}; use auto or student"
            )
        return Format(student.model_type, reason)
    stored = dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    if (reason := blocking_dtype(student, stored)) is not None:
        raise RecipeError("dtype" if section.dtype == "auto" else "export.dtype", reason)
    try:
        export_dimensions(student, section.layout)
    except ValueError as error:
        raise RecipeError("export.layout", str(error).removeprefix("export.layout: ")) from None
    return Format(DEEPSEEK, notes=native_engine_notes(student))
