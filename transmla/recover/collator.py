"""What of a batch is scored, counted while the batch is still on the CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class CountingCollator:
    """A collator that looks at its batch while that is still on the CPU, so that nothing waits for the device later.

    It adds `kept` [n], the positions that are scored (`kept_positions`), and leaves out an attention mask that masks
    nothing. Asked of the device, their number and `mask.all()` would each stop the CPU until every kernel is done, and
    the device would then be idle until the next ones are launched.
    """

    def __init__(self, collator: Callable[[list], dict[str, Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: list) -> dict[str, Tensor]:
        batch = dict(self.collator(rows))
        if "attention_mask" in batch and bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
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


def trunk_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a collated batch that a model's trunk takes."""
    return {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}
