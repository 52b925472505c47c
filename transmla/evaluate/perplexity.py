"""Perplexity, KL(teacher‖student) and top-1 agreement on the same windows for every model.

The teacher's final hidden states are kept instead of its logits: D numbers a token in place of a vocabulary, and the
head turns a chunk of them into logits whenever they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from transmla.modeling.backends import cap
from transmla.modeling.window import final_softcap

CHUNK = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Quality:
    """Means over all predicted tokens. perplexity: exp of the mean negative log-likelihood. kl: nats a token.
    top1: share of tokens where student and teacher agree on the likeliest word."""

    perplexity: float
    kl: float
    top1: float
    tokens: int


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
    nll = kl = agree = torch.zeros((), dtype=torch.float64, device=device)
    target = windows[:, 1:].flatten()
    own, other = student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1)
    for start in range(0, len(target), CHUNK):
        part = slice(start, start + CHUNK)
        log_s = F.log_softmax(cap(own[part].to(device).float() @ student_head.T, softcap), dim=-1)
        log_t = F.log_softmax(cap(other[part].to(device).float() @ teacher_head.T, softcap), dim=-1)
        nll = nll - log_s.gather(1, target[part, None].to(device)).double().sum()
        kl = kl + F.kl_div(log_s, log_t, log_target=True, reduction="sum").double()
        agree = agree + (log_s.argmax(-1) == log_t.argmax(-1)).sum()
    count = len(target)
    return Quality(
        perplexity=float(torch.exp(nll / count)), kl=float(kl / count), top1=float(agree / count), tokens=count
    )


class Judge:
    """Compares models with one on fixed windows [n, L]; keeps that one's hidden states, not its logits."""

    def __init__(self, source: PreTrainedModel, windows: Tensor, batch_size: int) -> None:
        self.source, self.windows, self.batch_size = source, windows, batch_size
        self.hidden = final_hidden(source, windows, batch_size, "original")

    def __call__(self, model: PreTrainedModel, label: str) -> Quality:
        hidden = self.hidden if model is self.source else final_hidden(model, self.windows, self.batch_size, label)
        head, other = (one.get_output_embeddings().weight.detach() for one in (model, self.source))
        return compare(self.windows, hidden, head, self.hidden, other, final_softcap(self.source.config))
