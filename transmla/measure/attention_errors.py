"""Errors of the student's attentions, layer by layer, against the teacher's; no gradient passes between layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transmla.measure.attention_taps import Tap, logit_errors, tapped
from transmla.modeling.kernels.packed import DOCUMENTS
from transmla.modeling.student import rotation


@contextmanager
def _hooked(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _after(modules: list[nn.Module], call: Callable) -> list:
    """Forward hooks call(index, arguments, keyword arguments, output)."""
    return [
        module.register_forward_hook(
            lambda module, args, kwargs, out, index=index: call(index, args, kwargs, out), with_kwargs=True
        )
        for index, module in enumerate(modules)
    ]


class _Errors:
    """Sums, by layer, of errors over the tokens that count.

    logits: weight of the attention's divergence; taps: by module, what the attentions compared, where that is not zero.
    """

    def __init__(
        self, batch: dict[str, Tensor], scales: list[float], logits: float, taps: dict[nn.Module, Tap]
    ) -> None:
        masked = "attention_mask" in batch and "document_bounds" not in batch  # packed rows have no padding
        self.keep = batch["attention_mask"].bool() if masked else None
        self.tokens = batch["input_ids"].numel() if self.keep is None else self.keep.sum()
        self.scales, self.found = scales, [torch.zeros(())] * len(scales)
        self.logits, self.taps = logits, taps

    def add_logits(self, index: int, own: nn.Module, source: nn.Module) -> None:
        """The attention's divergence, of its sample of queries, counted for all tokens. Of rows that are padded
        differently the sample is another share, so that here alone it matters a little which rows are a micro-batch."""
        if not self.logits:
            return
        teacher = self.taps.pop(source)
        found = logit_errors(self.taps.pop(own), teacher)
        kept = torch.ones_like(found) if self.keep is None else self.keep[:, teacher.chosen].to(found)
        found = (found * kept).sum() / kept.sum().clamp(min=1.0)
        self.found[index] = self.logits * self.tokens * found + self.found[index].to(found)

    def add(self, index: int, own: Tensor, expected: Tensor, weight: float = 1.0) -> None:
        if self.keep is not None:
            own, expected = own[self.keep], expected[self.keep]
        error = weight * normalised_error(own, expected, self.scales[index])
        self.found[index] = error + self.found[index].to(error)

    def stack(self) -> Tensor:
        return torch.stack(self.found)


def attention_errors(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batch: dict[str, Tensor],
    scales: list[float],
    *,
    stream: str = "teacher",
    hidden: float = 0.0,
    logits: float = 0.0,
) -> Tensor:
    """Normalised output error of every student attention, summed over tokens: [layers].

    With the teacher's stream the student's attentions run from hooks on the teacher's, so that the trunk is computed
    once and without a gradient. With the student's own, the student's trunk runs too.

    Args:
        batch: `input_ids` and optionally `attention_mask`, `position_ids` and boundaries, as a trunk takes them.
        scales: E|output|² of every teacher attention.
        stream: whose residual stream the student's attentions read, `teacher` or `student`.
        hidden: weight of the error of the stream after the layer, divided by the same scale.
        logits: weight of the divergence of the student's attention distributions from the teacher's, in nats, mean over
            heads and a sample of the queries.
    """
    tapping: AbstractContextManager[dict[nn.Module, Tap]] = tapped(teacher, student) if logits else nullcontext({})
    with tapping as taps:
        errors = _Errors(batch, scales, logits, taps)
        if stream == "student":
            _own_stream(teacher, student, batch, errors, hidden)
        elif hidden:
            _layers_on_the_teachers_stream(teacher, student, batch, errors, hidden)
        else:
            _attentions_on_the_teachers_stream(teacher, student, batch, errors)
    return errors.stack()


def _rotation(student: PreTrainedModel, batch: dict[str, Tensor]) -> Callable[[int], tuple[Tensor, Tensor]]:
    ids, positions = batch["input_ids"], batch.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    states = student.model.embed_tokens.weight[:1]
    return lambda index: rotation(student, states, positions, index)


def _attentions_on_the_teachers_stream(teacher, student, batch, errors: _Errors) -> None:
    rotation, grad = _rotation(student, batch), torch.is_grad_enabled()

    def transfer(index: int, args: tuple, kwargs: dict, expected: tuple) -> None:
        with torch.set_grad_enabled(grad):
            own, _ = student.model.layers[index].self_attn(
                kwargs["hidden_states"].detach(),
                position_embeddings=rotation(index),
                attention_mask=kwargs["attention_mask"],
                **{key: kwargs[key] for key in DOCUMENTS if key in kwargs},
            )
            errors.add(index, own, expected[0])
            errors.add_logits(index, student.model.layers[index].self_attn, teacher.model.layers[index].self_attn)

    with _hooked(_after([layer.self_attn for layer in teacher.model.layers], transfer)), torch.no_grad():
        teacher.model(**batch, use_cache=False)


def _layers_on_the_teachers_stream(teacher, student, batch, errors: _Errors, hidden: float) -> None:
    rotation, grad = _rotation(student, batch), torch.is_grad_enabled()
    outputs: dict[int, Tensor] = {}

    def transfer(index: int, args: tuple, kwargs: dict, expected: Tensor) -> None:
        with torch.set_grad_enabled(grad):
            own = student.model.layers[index](*args, **kwargs | {"position_embeddings": rotation(index)})
            errors.add(index, own, expected, hidden)
            errors.add_logits(index, student.model.layers[index].self_attn, teacher.model.layers[index].self_attn)

    def compare(index: int, args: tuple, kwargs: dict, own: tuple) -> None:
        errors.add(index, own[0], outputs.pop(index))

    handles = _after(
        [layer.self_attn for layer in teacher.model.layers], lambda i, a, k, out: outputs.update({i: out[0]})
    )
    handles += _after(list(teacher.model.layers), transfer)
    handles += _after([layer.self_attn for layer in student.model.layers], compare)
    with _hooked(handles), torch.no_grad():
        teacher.model(**batch, use_cache=False)


def _own_stream(teacher, student, batch, errors: _Errors, hidden: float) -> None:
    attention, after = {}, {}
    handles = _after(
        [layer.self_attn for layer in teacher.model.layers], lambda i, a, k, out: attention.update({i: out[0]})
    )
    if hidden:
        handles += _after(list(teacher.model.layers), lambda i, a, k, out: after.update({i: out}))
    with _hooked(handles), torch.no_grad():
        teacher.model(**batch, use_cache=False)

    def compare(index: int, args: tuple, kwargs: dict, own: tuple) -> tuple | None:
        errors.add(index, own[0], attention.pop(index))
        errors.add_logits(index, student.model.layers[index].self_attn, teacher.model.layers[index].self_attn)
        return None if hidden else (own[0].detach(), *own[1:])  # no graph through the trunk that nobody needs

    def compare_stream(index: int, args: tuple, kwargs: dict, own: Tensor) -> Tensor:
        if hidden:
            errors.add(index, own, after.pop(index), hidden)
        return own.detach()

    handles = _after([layer.self_attn for layer in student.model.layers], compare)
    handles += _after(list(student.model.layers), compare_stream)
    with _hooked(handles):
        student.model(**batch, use_cache=False)


def normalised_error(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """Sum over tokens of |student - teacher|² / scale. student, teacher: [..., D]; scale: E|teacher|²."""
    return (student.float() - teacher.float()).square().sum() / scale


@torch.no_grad()
def layer_errors(
    teacher: PreTrainedModel, student: PreTrainedModel, window: Tensor, scales: list[float]
) -> list[float]:
    """Normalised output error of every attention, the mean over one window [1, L]."""
    errors = attention_errors(teacher, student, {"input_ids": window.to(teacher.device)}, scales)
    return (errors / window.numel()).tolist()
