"""What a recipe leaves `auto`, chosen on calibration text that the moments were not measured on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transmla.convert.calibration import LayerStatistics
from transmla.errors import RecipeError
from transmla.geometry import MLAGeometry, candidates, derive_geometry
from transmla.measure.attention_errors import attention_errors
from transmla.measure.perplexity import Judge
from transmla.recipe.schema import Convert

SHARE = 8  # one window in so many is held out,

TOKENS = 8192  # but not more than so many tokens

Assemble = Callable[[Convert, MLAGeometry], PreTrainedModel]


def split(windows: Tensor, settings: Convert) -> tuple[Tensor, Tensor | None]:
    """Calibration windows [n, L] to measure on, and those held out for a search, or None where nothing is searched.

    Raises:
        RecipeError: there is one window, and something to search.
    """
    if not settings.searched:
        return windows, None
    if len(windows) < 2:
        raise RecipeError(
            "convert.calibration.tokens", "one window cannot be measured on and judge what is auto; use more"
        )
    count = max(1, min(len(windows) // SHARE, TOKENS // windows.shape[1]))
    chosen = torch.linspace(0, len(windows) - 1, count + 2)[1:-1].round().long()  # spread over the text's domains
    keep = torch.ones(len(windows), dtype=torch.bool)
    keep[chosen] = False
    return windows[keep], windows[~keep]


def search(
    source: PreTrainedModel, settings: Convert, statistics: list[LayerStatistics], held_out: Tensor, assemble: Assemble
) -> tuple[Convert, MLAGeometry, list[str]]:
    """Fill in everything that is `auto`.

    Dimensions, collapse and a freqfold or mean rotation for all layers are judged by the KL of the assembled student,
    without refit, to the source; the freqfold of a layer by its attention's output error on the source's own inputs.

    Args:
        held_out: tokens, [m, L]. assemble: from settings and geometry to a student.

    Returns:
        Settings without `auto` (freqfold excepted, which the geometry has by layer), geometry, and a line a decision.
    """
    judge = Judge(source, held_out, settings.calibration.batch_size)
    lines: list[str] = []

    def best(options: list[Convert], name: Callable[[Convert], str]) -> Convert:
        if len(options) == 1:
            return options[0]
        scores = []
        for option in options:
            scores.append(judge(assemble(option, derive_geometry(source.config, option)), name(option)).kl)
            lines.append(f"{name(option)}: KL {scores[-1]:.4f} on held-out calibration text")
        return options[min(range(len(options)), key=scores.__getitem__)]

    if settings.mean_rotation == "auto":
        tried = [
            first.model_copy(update={"mean_rotation": flag})
            for first in candidates(source.config, settings)[:1]
            for flag in (True, False)
        ]
        chosen = best(tried, lambda option: f"mean_rotation {option.mean_rotation}")
        settings = settings.model_copy(update={"mean_rotation": chosen.mean_rotation})
    settings = best(
        candidates(source.config, settings),
        lambda option: f"rope {option.qk_rope_head_dim} + latent {option.kv_lora_rank}, collapse {option.collapse}",
    )
    geometry = derive_geometry(source.config, settings)
    settings = settings.model_copy(update={"collapse": geometry.collapse})
    if settings.freqfold != "auto":
        return settings, geometry, lines
    folds = folds_of(geometry)
    options = [settings.model_copy(update={"freqfold": fold}) for fold in folds]
    if settings.method == "transmla":
        settings = best(options, lambda option: f"freqfold {option.freqfold}")
        return settings, derive_geometry(source.config, settings), lines
    scales = [layer.output_mean_square for layer in statistics]
    errors: list[Tensor] = []
    for option in options:
        student = assemble(option, derive_geometry(source.config, option))
        errors.append(output_errors(source, student, held_out, scales))
        lines.append(f"freqfold {option.freqfold}: mean output error of a layer {float(errors[-1].mean()):.4f}")
        if len(errors) > 1 and bool((errors[-1] >= torch.stack(errors[:-1]).amin(0)).all()):
            break  # no layer gains any more
    picks = torch.stack(errors).argmin(0).tolist()
    geometry = derive_geometry(source.config, options[0], freqfold=tuple(folds[pick] for pick in picks))
    lines.append(f"freqfold by layer: {[geometry.freqfold_of(layer) for layer in range(len(picks))]}")
    return settings, geometry, lines


def folds_of(geometry: MLAGeometry) -> list[int]:
    """The freqfolds that a search tries, the finest first."""
    return [geometry.collapse * 2**n for n in range(6) if geometry.collapse * 2**n <= geometry.head_dim // 2]


@torch.no_grad()
def output_errors(source: PreTrainedModel, student: PreTrainedModel, windows: Tensor, scales: list[float]) -> Tensor:
    """Normalised output error of every attention on the source's inputs, the mean over windows [n, L]: [layers]."""
    total = [attention_errors(source, student, {"input_ids": row[None].to(source.device)}, scales) for row in windows]
    return (torch.stack(total).sum(0) / windows.numel()).double().cpu()
