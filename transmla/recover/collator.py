"""What of a batch is scored, counted while the batch is still on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from transmla.modeling.kernels.packed import boundaries, plan_of, trunk_arguments


class CountingCollator:
    """A collator that looks at its batch while that is still on the CPU, so that nothing waits for the device later.

    It adds `kept` [n], the positions that are scored (`kept_positions`), and leaves out an attention mask that masks
    nothing. Asked of the device, their number and `mask.all()` would each stop the CPU until every kernel is done, and
    the device would then be idle until the next ones are launched. For the same reason the boundaries of packed
    documents are found here, where attention goes by them (`packed`), and what its kernel is chosen by (`kernel`, as
    `plan_of` takes it).
    """

    def __init__(self, collator: Callable[[list], dict[str, Tensor]], *, packed: bool = False) -> None:
        self.collator, self.packed, self.kernel = collator, packed, "auto"

    def __call__(self, rows: list) -> dict[str, Any]:
        batch: dict[str, Any] = dict(self.collator(rows))
        if "attention_mask" in batch and bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
        if self.packed:
            bounds = boundaries(batch["position_ids"])
            batch |= {"document_bounds": bounds, "document_plan": plan_of(bounds, self.kernel)}
        return batch | {"kept": kept_positions(batch["labels"])}


def kept_positions(labels: Tensor) -> Tensor:
    """Positions whose successor has a label, counted through rows of T - 1. labels: [B, T] -> [n]."""
    return (labels[:, 1:] != -100).flatten().nonzero()[:, 0]


def scored(inputs: dict[str, Tensor]) -> Tensor:
    """The scored positions of a batch, counted where its collator did not."""
    return inputs["kept"] if "kept" in inputs else kept_positions(inputs["labels"])


def kept_of(values: Tensor, kept: Tensor) -> Tensor:
    """What stands at the kept positions. values: [B, T - 1, ...] -> [n, ...]."""
    flat = values.flatten(0, 1)
    return flat if len(kept) == len(flat) else flat.index_select(0, kept)


def trunk_inputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The part of a collated batch that a model's trunk takes, boundaries of packed documents included."""
    batch: dict[str, Tensor] = {}
    for key in ("input_ids", "attention_mask", "position_ids"):
        if key in inputs:
            batch[key] = inputs[key]
    if "document_plan" in inputs:
        batch |= trunk_arguments(inputs["document_bounds"], inputs["document_plan"])
    return batch
