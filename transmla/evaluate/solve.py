"""Accuracy by generation: a model answers problems, a checker reads the answers."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.data.generate import ModelSampler, Sample, batch_seed
from transmla.data.problems import ProblemSet
from transmla.data.write import Questions
from transmla.recipe_write import Solve

SHOWN = 2  # replies that a record keeps
LENGTH = 1200  # characters of each


def questions(found: ProblemSet, settings: Solve, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """The prompts of an evaluation: one reply to each problem."""
    return Questions(found, settings.problems, tokenizer, samples=1, batch_size=settings.batch_size)


def solve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: ProblemSet, settings: Solve, *, seed: int = 0
) -> dict[str, Any]:
    """Have a model answer problems and score the replies; `score` says what is returned."""
    asked, sampler = questions(problems, settings, tokenizer), ModelSampler(model, tokenizer)
    parts = [
        sampler(asked.prompts_of(batch), settings, batch_seed(seed, settings.name, batch))
        for batch in range(len(asked.plan))
    ]
    return score(asked, asked.ordered(parts))


def score(asked: Questions, samples: list[Sample]) -> dict[str, Any]:
    """What the replies are worth.

    A reply that did not end by itself counts as wrong: what it would have answered is not known.

    Returns:
        accuracy: share of accepted replies. count: problems. standard_error: sqrt(p (1 - p) / n). interval: Wilson's,
        95 %. finished: share of replies that ended by themselves. tokens: mean length of a reply. replies: the first
        few, with question, reply and whether it was accepted.
    """
    accepted = [asked.accepted(index, sample) for index, sample in enumerate(samples)]
    count = len(samples)
    accuracy = sum(accepted) / count
    return {
        "accuracy": accuracy,
        "count": count,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        "interval": list(wilson(sum(accepted), count)),
        "finished": sum(sample.finished for sample in samples) / count,
        "tokens": sum(len(sample.tokens) for sample in samples) / count,
        "replies": [
            {
                "question": asked.found.problems[index].question,
                "reply": asked.reply(index, sample)[:LENGTH],
                "accepted": accepted[index],
            }
            for index, sample in enumerate(samples[:SHOWN])
        ],
    }


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927). z: 1.96 for 95 %."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
