"""Distillation: KL to the teacher's next-token distribution on every unmasked token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTConfig

from transmla.modeling.window import final_softcap
from transmla.recover.losses import forward_kl
from transmla.recover.trainer import Objective, TeacherTrainer, trunk_inputs


class DistillTrainer(TeacherTrainer):
    """Forward KL, chunked over tokens through both heads (transmla.recover.losses.forward_kl)."""

    def __init__(
        self, model: PreTrainedModel, args: SFTConfig, *, teacher: PreTrainedModel, temperature: float, **kwargs: object
    ) -> None:
        super().__init__(model, args, teacher=teacher, **kwargs)
        self.temperature = temperature

    def objective(self, student: nn.Module, inputs: dict[str, Tensor]) -> Objective:
        """Position t of student and teacher is scored where label t + 1 counts."""
        batch = trunk_inputs(inputs)
        mask = inputs["labels"][:, 1:] != -100
        with torch.no_grad():
            expected = self.teacher.model(**batch, use_cache=False).last_hidden_state[:, :-1][mask]
        hidden = student.model(**batch, use_cache=False).last_hidden_state[:, :-1][mask]
        total = forward_kl(
            hidden,
            student.get_output_embeddings().weight,
            expected,
            self.teacher.get_output_embeddings().weight,
            temperature=self.temperature,
            softcap=final_softcap(self.teacher.config),
        )
        return Objective(total=total, tokens=mask.sum())
