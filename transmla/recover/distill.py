"""Training on next tokens: towards a teacher's distribution, towards labels, or a mixture of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig

from transmla.data.rows import ROW
from transmla.modeling.config_facts import final_softcap
from transmla.recover.collator import kept_of, scored, trunk_inputs
from transmla.recover.losses import Kept, Mixture, Teacher, token_loss
from transmla.recover.teachers.kept import TeacherStates
from transmla.recover.trainer import Objective, RecoveryTrainer


class DistillTrainer(RecoveryTrainer):
    """Divergence to the teacher on every unmasked token (transmla.recover.losses.token_loss).

    Args:
        teacher: the model to come near to; None where `recorded`, set before training, speaks for it.
        mixture: divergence, temperature at the start, share of the cross-entropy.
        final_temperature: what the temperature has become, linearly, in the last step; None: it stays.
        recorded: from a collated batch to the teacher's kept probabilities of its unmasked tokens, in order.

    `states`, where it is set before training, keeps the teacher's hidden states by row; batches then carry `row`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        *,
        teacher: PreTrainedModel | None,
        mixture: Mixture,
        final_temperature: float | None = None,
        recorded: Callable[[dict[str, Any]], Kept] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, teacher=teacher, **kwargs)
        self.mixture, self.final_temperature, self.recorded = mixture, final_temperature, recorded
        self.states: TeacherStates | None = None

    def objective(self, student: PreTrainedModel, inputs: dict[str, Tensor]) -> Objective:  # type: ignore[override]
        """Position t of student and teacher is scored where label t + 1 counts."""
        batch = trunk_inputs(inputs)
        kept = scored(inputs)
        if self.teacher is None:
            assert self.recorded is not None, "without a teacher, what it said must have been recorded"
            expected: Teacher | Kept = self.recorded(inputs)
        else:
            states = self._teacher_states(inputs)
            expected = Teacher(kept_of(states[:, :-1], kept), self.teacher.get_output_embeddings().weight)
        hidden = student.model(**batch, use_cache=False).last_hidden_state
        total = token_loss(
            kept_of(hidden[:, :-1], kept),
            student.get_output_embeddings().weight,
            expected,
            labels=kept_of(inputs["labels"][:, 1:], kept),
            mixture=replace(self.mixture, temperature=self.temperature()),
            softcap=final_softcap(student.config),
        )
        return Objective(total=total, tokens=torch.tensor(len(kept)))

    @torch.no_grad()
    def _teacher_states(self, inputs: dict[str, Any]) -> Tensor:
        """The teacher's final hidden states of a batch, [B, T, D]."""
        teacher = self.teacher
        assert teacher is not None

        def read() -> Tensor:
            return teacher.model(**trunk_inputs(inputs), use_cache=False).last_hidden_state

        return read() if self.states is None else self.states(inputs[ROW], read)

    def temperature(self) -> float:
        """Of the present step."""
        start = self.mixture.temperature
        if self.final_temperature is None:
            return start
        done = min(1.0, self.state.global_step / max(1, self.args.max_steps - 1))
        return start + done * (self.final_temperature - start)


class SFTStageTrainer(RecoveryTrainer):
    """Cross-entropy of the labels, whole vocabulary, in chunks; no teacher."""

    def objective(self, student: PreTrainedModel, inputs: dict[str, Tensor]) -> Objective:  # type: ignore[override]
        """Position t is scored where label t + 1 counts."""
        kept = scored(inputs)
        hidden = student.model(**trunk_inputs(inputs), use_cache=False).last_hidden_state
        total = token_loss(
            kept_of(hidden[:, :-1], kept),
            student.get_output_embeddings().weight,
            None,
            labels=kept_of(inputs["labels"][:, 1:], kept),
            softcap=final_softcap(student.config),
        )
        return Objective(total=total, tokens=torch.tensor(len(kept)))
