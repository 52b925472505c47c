"""How far an engine's answers are from a reference's: log-probabilities and greedy tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """difference: the largest of a log-probability, nats. kl: mean KL(reference ‖ engine), nats per token.

    words: how many words of the vocabulary were compared at every token; the others count as one.
    """

    difference: float
    kl: float
    tokens: int
    words: int


@dataclass(frozen=True)
class Greedy:
    """same of total tokens are the reference's and come before a reply parts from it: after that the two continue
    different texts. parted: how many replies part. gap: by how much at most the reference prefers its own word there,
    nats."""

    same: int
    total: int
    parted: int
    gap: float


def distance(expected: Tensor, scores: Tensor) -> Distance:
    """Over the whole vocabulary. expected, scores: log-probabilities [n, L, V]."""
    kl = torch.stack([_kl(own, other) for own, other in zip(expected, scores, strict=True)]).mean()
    n, length, words = expected.shape
    return Distance(float((scores - expected).abs().max()), float(kl), n * length, words)


def _kl(own: Tensor, other: Tensor) -> Tensor:
    """KL at every token in float64: in float32 the terms of near distributions cancel to less than nothing."""
    own = own.double()
    return (own.exp() * (own - other.double())).sum(-1)


def distance_of_likeliest(expected: Tensor, words: Tensor, values: Tensor) -> Distance:
    """Over the words that an engine finds likeliest. The KL of the two distributions with all other words as one, which
    is at most the whole one.

    Args:
        expected: [n, L, V]. words, values: [n, L - 1, K], of the second token on.
    """
    own = expected[:, : words.shape[1]].gather(-1, words)
    rest, other = (1 - own.exp().sum(-1)).clamp(min=1e-9), (1 - values.exp().sum(-1)).clamp(min=1e-9)
    kl = (own.exp() * (own - values)).sum(-1) + rest * (rest / other).log()
    n, length, count = words.shape
    return Distance(float((values - own).abs().max()), float(kl.mean()), n * length, count)


def greedy_distance(expected: Tensor, words: Tensor, values: Tensor, found: Tensor) -> Greedy:
    """Greedy tokens of an engine beside the reference's.

    Args:
        expected, found: tokens [n, T]. words, values: the reference's likeliest words and their log-probabilities
            [n, T, K].
    """
    equal = expected == found
    gaps = []
    for row, step in [(row, int((~equal[row]).nonzero()[0])) for row in range(len(equal)) if not equal[row].all()]:
        own = values[row, step]
        place = (words[row, step] == found[row, step]).nonzero()
        gaps.append(float(own[0] - own[place[0, 0]]) if len(place) else math.inf)  # not among the kept: far
    same = int(equal.cumprod(-1).sum())
    return Greedy(same, equal.numel(), len(gaps), max(gaps, default=0.0))


def prompts_of(tokens: Tensor, count: int, length: int) -> Tensor:
    """Prompts [count, length] cut from text [n, L] at even distances."""
    text = tokens.flatten()
    length = min(length, len(text))
    starts = torch.linspace(0, len(text) - length, count).long()
    return torch.stack([text[start : start + length] for start in starts])
