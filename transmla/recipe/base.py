"""The base of every section of a recipe: frozen, unknown keys are refused, and numbers are finite."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are frozen once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def chosen(self, name: str) -> bool:
        """Whether a field was given another value than its default. A recipe that was saved beside a result names every
        key, also those that do nothing in it."""
        return name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].get_default()
