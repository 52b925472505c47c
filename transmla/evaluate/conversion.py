"""The three models of a conversion on the same windows: the original, the one with partial RoPE, and the MLA student."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from transmla.convert.calibration import LayerStatistics, calibrate
from transmla.convert.convert import solve_model
from transmla.evaluate.perplexity import Quality, compare, final_hidden
from transmla.geometry import MLAGeometry, derive_geometry, full_rank
from transmla.recipe import Convert

SEARCH_TOKENS = 8192  # calibration text that a search of freqfold is judged on


@dataclass(frozen=True)
class Converted:
    """A conversion and what it cost.

    student: MLA, in the source's dtype. settings, geometry: with the freqfold that was used. statistics: by layer.
    quality: of `original`, `partial_rope` and `mla`, KL and top-1 against the original; empty without windows.
    """

    student: PreTrainedModel
    settings: Convert
    geometry: MLAGeometry
    statistics: list[LayerStatistics]
    quality: dict[str, Quality]

    def describe(self) -> dict[str, Any]:
        """What a record keeps: dimensions, cache, quality."""
        return self.geometry.describe() | {"quality": {name: asdict(value) for name, value in self.quality.items()}}


def partial_rope(config: PretrainedConfig, settings: Convert) -> Convert:
    """Settings of the student that lost nothing but rotations: same rope head, latent and queries of full rank."""
    return settings.model_copy(
        update={"kv_lora_rank": full_rank(config), "q_lora_rank": None, "latent_norm": False}
    )


class _Judge:
    """Compares students with the original on fixed windows [n, L]; keeps the original's hidden states, not its logits."""

    def __init__(self, source: PreTrainedModel, windows: Tensor, batch_size: int) -> None:
        self.source, self.windows, self.batch_size = source, windows, batch_size
        self.hidden = final_hidden(source, windows, batch_size, "original")

    def __call__(self, model: PreTrainedModel, label: str) -> Quality:
        hidden = self.hidden if model is self.source else final_hidden(model, self.windows, self.batch_size, label)
        head, other = (one.get_output_embeddings().weight.detach() for one in (model, self.source))
        return compare(self.windows, hidden, head, self.hidden, other)


def convert_and_compare(
    source: PreTrainedModel,
    settings: Convert,
    calibration: Tensor,
    *,
    windows: Tensor | None,
    batch_size: int,
    search: bool,
) -> Converted:
    """Calibrate once; solve the partial-RoPE and the MLA student; measure both and the original.

    Args:
        calibration: [n, L] tokens. windows: [m, L'] tokens of other text, or None to measure nothing.
        batch_size: windows at a time in evaluation.
        search: choose freqfold, where it is `auto`, by `search_freqfold`.
    """
    batches = calibration.split(settings.calibration.batch_size)
    statistics = calibrate(source, batches, length=settings.calibration.max_length, total=len(batches))
    if search and settings.freqfold == "auto":
        count = max(1, SEARCH_TOKENS // calibration.shape[1])
        judge = _Judge(source, calibration[-count:], settings.calibration.batch_size)
        settings = settings.model_copy(update={"freqfold": search_freqfold(source, settings, statistics, judge)})
    geometry = derive_geometry(source.config, settings)
    quality: dict[str, Quality] = {}
    if windows is not None:
        judge = _Judge(source, windows, batch_size)
        quality["original"] = judge(source, "original")
        quality["partial_rope"] = judge(_partial_student(source, settings, statistics), "partial RoPE")
    student = solve_model(source, geometry, settings, statistics)
    if windows is not None:
        quality["mla"] = judge(student, "MLA")
    return Converted(student, settings, geometry, statistics, quality)


def _partial_student(
    source: PreTrainedModel, settings: Convert, statistics: list[LayerStatistics]
) -> PreTrainedModel:
    settings = partial_rope(source.config, settings)
    return solve_model(source, derive_geometry(source.config, settings), settings, statistics)


def search_freqfold(
    source: PreTrainedModel, settings: Convert, statistics: list[LayerStatistics], judge: _Judge
) -> int:
    """The freqfold whose partial-RoPE student is nearest to the original (KL), doubled from collapse while it helps.

    Judged on calibration text, never on the text that a perplexity is reported of.
    """
    geometry = derive_geometry(source.config, settings)
    pairs = geometry.head_dim // 2
    best, freqfold, least = geometry.collapse, geometry.collapse, float("inf")
    while freqfold <= pairs and pairs % freqfold == 0:
        tried = settings.model_copy(update={"freqfold": freqfold})
        kl = judge(_partial_student(source, tried, statistics), f"freqfold {freqfold}").kl
        print(f"freqfold {freqfold}: KL {kl:.4f} on calibration text", flush=True)
        if kl >= least:
            break
        best, least, freqfold = freqfold, kl, 2 * freqfold
    return best
