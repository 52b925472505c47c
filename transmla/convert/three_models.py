"""The three models of a conversion on the same windows: the original, the one with partial RoPE, and the MLA
student."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from transmla.convert.conversion import Conversion, assemble_student, convert_model, refit_model
from transmla.geometry import derive_geometry, full_rank
from transmla.measure.perplexity import Judge, Quality
from transmla.recipe.schema import Convert


@dataclass(frozen=True)
class Compared:
    """A conversion and the quality of `original`, `partial_rope` and `mla` against the original; empty without
    windows."""

    conversion: Conversion
    quality: dict[str, Quality]

    def describe(self) -> dict[str, Any]:
        """What an artifact keeps: dimensions, cache, choices, quality."""
        kept = self.conversion.describe()
        return kept.pop("geometry") | kept | {"quality": {name: asdict(value) for name, value in self.quality.items()}}


def partial_rope(config: PretrainedConfig, settings: Convert) -> Convert:
    """Settings of the student that lost nothing but rotations: same rope head, latent and queries of full rank."""
    whole = {"kv_lora_rank": full_rank(config), "latent_heads": 1, "tied": False}
    return settings.model_copy(update=whole | {"q_lora_rank": None, "latent_norm": False})


def convert_and_compare(
    source: PreTrainedModel, settings: Convert, calibration: Tensor, *, windows: Tensor | None, batch_size: int
) -> Compared:
    """Calibrate once; solve the partial-RoPE and the MLA student; measure both and the original.

    Args:
        calibration: [n, L] tokens. windows: [m, L'] tokens of other text, or None to measure nothing.
        batch_size: windows at a time in evaluation.
    """
    done = convert_model(source, settings, calibration)
    quality: dict[str, Quality] = {}
    if windows is not None:
        judge = Judge(source, windows, batch_size)
        quality["original"] = judge(source, "original")
        partial = partial_rope(source.config, done.settings)
        geometry = replace(derive_geometry(source.config, partial), freqfold=done.geometry.freqfold)
        student = assemble_student(source, geometry, partial, done.statistics)
        if partial.refit:
            refit_model(source, student, partial, done.fitted_on)
        quality["partial_rope"] = judge(student, "partial RoPE")
        quality["mla"] = judge(done.student, "MLA")
    return Compared(done, quality)
