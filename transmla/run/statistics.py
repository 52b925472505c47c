"""What later stages need of the source's calibration: a file beside every student, which needs no earlier one then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATISTICS = "statistics.safetensors"


def save_statistics(scales: Sequence[float], shifts: Tensor | None, folder: Path) -> None:
    """Write the file.

    Args:
        scales: E|o|² of every source attention, by which layerwise errors are divided. shifts: of the routers' logits,
            [2, layers, D], for an export that writes them as DeepSeek's.
    """
    found = {"output_mean_square": torch.tensor(scales, dtype=torch.float64)}
    save_file(found | ({} if shifts is None else {"router_shifts": shifts}), folder / STATISTICS)


def output_scales(folder: Path) -> list[float]:
    """E|o|² of every source attention, from beside a student."""
    return load_file(folder / STATISTICS)["output_mean_square"].tolist()


def router_shifts(folder: Path) -> Tensor | None:
    """The shifts of a student's routers, from beside it; None where they stay as they are."""
    return load_file(folder / STATISTICS).get("router_shifts")
