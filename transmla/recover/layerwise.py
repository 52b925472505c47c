"""Attention transfer: every student attention on the teacher's own inputs, towards the teacher's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTConfig

from transmla.recover.losses import normalised_error
from transmla.recover.trainer import Objective, TeacherTrainer, trunk_inputs


class LayerwiseTrainer(TeacherTrainer):
    """One teacher pass a batch; all layers learn at once; no gradient runs through the trunk.

    Loss: mean over layers and tokens of |student's output - teacher's output|² / E|teacher's output|².

    Args:
        scales: E|output|² of every teacher attention, from calibration.
    """

    def __init__(
        self, model: PreTrainedModel, args: SFTConfig, *, teacher: PreTrainedModel, scales: list[float], **kwargs: object
    ) -> None:
        super().__init__(model, args, teacher=teacher, **kwargs)
        self.scales = scales

    def objective(self, student: nn.Module, inputs: dict[str, Tensor]) -> Objective:
        """Mean over layers of the summed normalised error."""
        errors = attention_errors(self.teacher, student, trunk_inputs(inputs), self.scales)
        return Objective(total=errors.mean(), tokens=self.count_tokens(inputs))

    def count_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Every token counts here, whatever its label."""
        if "attention_mask" in batch:
            return batch["attention_mask"].sum()
        return torch.tensor(batch["input_ids"].numel())


def attention_errors(
    teacher: PreTrainedModel, student: nn.Module, batch: dict[str, Tensor], scales: list[float]
) -> Tensor:
    """Normalised output error of every student attention on the teacher's inputs, summed over tokens: [layers].

    The student's attentions run from hooks on the teacher's, so the trunk is computed once and without a gradient.

    Args:
        batch: `input_ids` and optionally `attention_mask` and `position_ids`, as a trunk takes them.
        scales: E|output|² of every teacher attention.
    """
    keep = batch["attention_mask"].bool() if "attention_mask" in batch else None
    errors: list[Tensor | None] = [None] * len(scales)
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)[None]
    states = student.model.embed_tokens.weight[:1]
    grad = torch.is_grad_enabled()

    def transfer(index: int, kwargs: dict, expected: Tensor) -> None:
        with torch.set_grad_enabled(grad):
            own, _ = student.model.layers[index].self_attn(
                kwargs["hidden_states"].detach(),
                position_embeddings=student.rotation(states, positions, index),
                attention_mask=kwargs["attention_mask"],
            )
            if keep is not None:
                own, expected = own[keep], expected[keep]
            errors[index] = normalised_error(own, expected, scales[index])

    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, out, index=index: transfer(index, kwargs, out[0]), with_kwargs=True
        )
        for index, layer in enumerate(teacher.model.layers)
    ]
    try:
        with torch.no_grad():
            teacher.model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(errors)
