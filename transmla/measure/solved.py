"""Accuracy by generation: a model answers problems, a checker reads the answers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.generate.problems import ProblemSet
from transmla.generate.prompts import ProblemPrompts
from transmla.generate.sampler import ModelSampler, Sample, batch_seed
from transmla.measure.intervals import around, mean, standard_error, wilson
from transmla.recipe.writing import Solve

SHOWN = 2  # replies that a record keeps

LENGTH = 1200  # characters of each


def prompts_of(found: ProblemSet, settings: Solve, tokenizer: PreTrainedTokenizerBase) -> ProblemPrompts:
    """The prompts of an evaluation: every problem as often as it is answered."""
    return ProblemPrompts(found, settings.problems, tokenizer, samples=settings.samples, batch_size=settings.batch_size)


def solve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: ProblemSet, settings: Solve, *, seed: int = 0
) -> dict[str, Any]:
    """Have a model answer problems and score the replies; `score` says what is returned."""
    asked, sampler = prompts_of(problems, settings, tokenizer), ModelSampler(model, tokenizer)
    parts = [
        sampler(asked.prompts_of(batch), settings, batch_seed(seed, settings.name, batch))
        for batch in range(len(asked.plan))
    ]
    return score(asked, asked.ordered(parts))


def score(asked: ProblemPrompts, samples: list[Sample]) -> dict[str, Any]:
    """What the replies are worth.

    A reply that did not end by itself counts as wrong: what it would have answered is not known.

    Returns:
        accuracy: mean over problems of the share of accepted replies. count: problems. standard_error: of that mean,
        from the spread between problems. interval: 95 %, Wilson's where each problem has one reply. finished: share of
        replies that ended by themselves. tokens: mean length of a reply. replies: to the first few problems, with
        question, reply and whether it was accepted.
    """
    accepted = [asked.accepted(index, sample) for index, sample in enumerate(samples)]
    shares = [mean(accepted[start : start + asked.samples]) for start in range(0, len(samples), asked.samples)]
    accuracy, error = mean(shares), standard_error(shares) or 0.0
    low, high = wilson(sum(accepted), len(samples)) if asked.samples == 1 else around(accuracy, error)
    return {
        "accuracy": accuracy,
        "count": len(shares),
        "standard_error": error,
        "interval": [max(0.0, low), min(1.0, high)],
        "finished": mean([sample.finished for sample in samples]),
        "tokens": mean([len(sample.tokens) for sample in samples]),
        "replies": [
            {
                "question": asked.found.problems[index // asked.samples].question,
                "reply": asked.reply(index, samples[index])[:LENGTH],
                "accepted": accepted[index],
            }
            for index in range(0, len(samples), asked.samples)[:SHOWN]
        ],
    }
