"""Perplexity, KL(teacher‖student) and top-1 agreement on the same windows for every model.

The teacher's final hidden states are kept instead of its logits: D numbers a token in place of a vocabulary, and the
head turns a chunk of them into logits whenever they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from transmla.measure.intervals import mean, standard_error, student_t
from transmla.modeling.config_facts import final_softcap
from transmla.modeling.kernels.eager import cap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Quality:
    """Means over all predicted tokens. perplexity: exp of the mean negative log-likelihood. kl: nats per token.
    top1: share of tokens where student and teacher agree on the likeliest word.

    kl_se, kl_interval, perplexity_interval: standard error and 95 % intervals, with windows as units, because tokens of
    one window are not independent (Student's distribution; of perplexity in its logarithm). None for a single window.
    """

    perplexity: float
    kl: float
    top1: float
    tokens: int
    windows: int
    kl_se: float | None
    kl_interval: tuple[float, float] | None
    perplexity_interval: tuple[float, float] | None


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in full precision. A trainer's `tf32` sets a switch of the whole process."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


@torch.no_grad()
def final_hidden(model: PreTrainedModel, windows: Tensor, batch_size: int, label: str) -> Tensor:
    """Hidden states after the last norm. windows: [n, L] -> [n, L, D] on the CPU, in the model's dtype."""
    states = []
    for batch in tqdm(windows.split(batch_size), desc=f"evaluate {label}", unit="batch"):
        states.append(model.model(input_ids=batch.to(model.device), use_cache=False).last_hidden_state.cpu())
    return torch.cat(states)


@torch.no_grad()
def compare(
    windows: Tensor,
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    softcap: float | None = None,
) -> Quality:
    """Compare two models from their final hidden states.

    Args:
        windows: [n, L] token ids; position t predicts token t + 1 of the same window.
        student, teacher: [n, L, D]. student_head, teacher_head: [V, D]; computed in float32 on the heads' device.
        softcap: cap on both models' logits, or None.
    """
    device = student_head.device
    student_head, teacher_head = student_head.float(), teacher_head.float()
    count, length = len(windows), windows.shape[1] - 1
    target = windows[:, 1:].flatten().to(device)
    own, other = student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1)
    sums = torch.zeros(3, count, dtype=torch.float64, device=device)  # by window: -log p, KL, agreements
    with full_float32():
        for start in range(0, len(target), CHUNK):
            part = slice(start, start + CHUNK)
            log_s = F.log_softmax(cap(own[part].to(device).float() @ student_head.T, softcap), dim=-1)
            log_t = F.log_softmax(cap(other[part].to(device).float() @ teacher_head.T, softcap), dim=-1)
            nll = -log_s.gather(1, target[part, None]).squeeze(1)
            agree = log_s.argmax(-1) == log_t.argmax(-1)
            kl = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
            window = torch.arange(start, start + len(nll), device=device) // length
            sums.index_add_(1, window, torch.stack([nll, kl, agree.float()]).double())
    nlls, kls, shares = (sums / length).tolist()
    return Quality(
        perplexity=math.exp(mean(nlls)),
        kl=mean(kls),
        top1=mean(shares),
        tokens=len(target),
        windows=count,
        kl_se=standard_error(kls),
        kl_interval=_interval(kls),
        perplexity_interval=None if (bounds := _interval(nlls)) is None else (math.exp(bounds[0]), math.exp(bounds[1])),
    )


def _interval(means: list[float]) -> tuple[float, float] | None:
    error = standard_error(means)
    if error is None:
        return None
    half = student_t(len(means) - 1) * error
    return mean(means) - half, mean(means) + half


class Judge:
    """Compares models with one on fixed windows [n, L]; keeps that one's hidden states, not its logits."""

    def __init__(self, source: PreTrainedModel, windows: Tensor, batch_size: int) -> None:
        self.source, self.windows, self.batch_size = source, windows, batch_size
        self.hidden = final_hidden(source, windows, batch_size, "original")

    def __call__(self, model: PreTrainedModel, label: str) -> Quality:
        hidden = self.hidden if model is self.source else final_hidden(model, self.windows, self.batch_size, label)
        head, other = (one.get_output_embeddings().weight.detach() for one in (model, self.source))
        return compare(self.windows, hidden, head, self.hidden, other, final_softcap(self.source.config))


def reference_of(teacher: PreTrainedModel, windows: Tensor, batch_size: int, label: str) -> dict[str, Tensor]:
    """What other models are compared with: `windows` [n, L], the teacher's final `hidden` states [n, L, D], its
    `head`."""
    hidden = final_hidden(teacher, windows, batch_size, label)
    head = teacher.get_output_embeddings().weight.detach()
    return {"windows": windows, "hidden": hidden, "head": head.cpu().clone()}


def compare_with_reference(
    model: PreTrainedModel,
    reference: dict[str, Tensor],
    batch_size: int,
    label: str,
    *,
    hidden: Tensor | None = None,
) -> Quality:
    """The quality of a model on a reference's windows.

    Args:
        reference: as `reference_of` makes it. hidden: the model's own states [n, L, D], where they are known.
    """
    if hidden is None:
        hidden = final_hidden(model, reference["windows"], batch_size, label)
    head = model.get_output_embeddings().weight.detach()
    other = reference["head"].to(head.device)
    return compare(reference["windows"], hidden, head, reference["hidden"], other, final_softcap(model.config))
