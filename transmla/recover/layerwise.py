"""Attention transfer: every student attention towards the output of the teacher's, all layers at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig

from transmla.measure.attention_errors import attention_errors
from transmla.recover.collator import trunk_inputs
from transmla.recover.trainer import Objective, RecoveryTrainer


class LayerwiseTrainer(RecoveryTrainer):
    """One teacher pass a batch; all layers learn at once; no gradient passes from one layer to another.

    Loss: mean over layers and tokens of |student's output - teacher's output|² / E|teacher's output|².

    Args:
        scales: E|output|² of every teacher attention, from calibration.
        stream, hidden, logits: as in `attention_errors`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        *,
        teacher: PreTrainedModel,
        scales: list[float],
        stream: str = "teacher",
        hidden: float = 0.0,
        logits: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, teacher=teacher, **kwargs)
        self.scales, self.stream, self.hidden, self.logits = scales, stream, hidden, logits

    def objective(self, student: PreTrainedModel, inputs: dict[str, Tensor]) -> Objective:  # type: ignore[override]
        """Mean over layers of the summed normalised error."""
        assert self.teacher is not None
        errors = attention_errors(
            self.teacher,
            student,
            trunk_inputs(inputs),
            self.scales,
            stream=self.stream,
            hidden=self.hidden,
            logits=self.logits,
        )
        return Objective(total=errors.mean(), tokens=self.count_tokens(inputs))

    def count_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Every token counts here, whatever its label."""
        if "attention_mask" in batch:
            return batch["attention_mask"].sum()
        return torch.tensor(batch["input_ids"].numel())
