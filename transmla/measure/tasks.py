"""Accuracy on questions with choices: of lm-eval-harness's tasks, and of files.

Files need neither network nor harness. Both are scored by transmla.measure.choices and judged as the harness does:
`acc` takes the likeliest choice, `acc_norm` the one with the highest log-likelihood a character of the choice (for
ASCII, a byte), the space before it not counted.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from transmla.errors import RecipeError
from transmla.measure.choices import loglikelihoods
from transmla.measure.intervals import mean, standard_error, wilson
from transmla.recipe.evaluation import ChoiceTask, Evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A context, the choices that may follow it immediately, and the index of the right one."""

    ctx: str
    choices: list[str]
    gold: int


@dataclass
class Answers:
    """A model's answers to one task, in the order of its questions.

    gold: the right choice (as the harness gives it: an index, several, or a text). picked, picked_norm: index of the
    chosen one. correct, correct_norm: 0 or 1; None where a task of the harness has no `acc_norm`.
    """

    gold: list[Any]
    picked: list[int]
    picked_norm: list[int]
    correct: list[float]
    correct_norm: list[float] | None

    def summary(self) -> dict[str, Any]:
        """count, and for `acc` and `acc_norm` the share, its standard error (the harness's) and Wilson's 95 %
        interval."""
        result: dict[str, Any] = {"count": len(self.correct)}
        for name, correct in (("acc", self.correct), ("acc_norm", self.correct_norm)):
            result[name] = None if correct is None else mean(correct)
            result[f"{name}_se"] = None if correct is None else standard_error(correct)
            result[f"{name}_interval"] = None if correct is None else wilson(sum(correct), len(correct))
        return result


def read_questions(task: ChoiceTask, key: str) -> list[Question]:
    """The questions of a file, at most `limit`.

    Raises:
        RecipeError: the file is missing, empty or broken; names the line.
    """
    assert task.path is not None
    file = Path(task.path).expanduser()
    if not file.is_file():
        raise RecipeError(key, f"no such file: {file}; correct the path")
    questions: list[Question] = []
    number = 0
    try:
        with _opened(file) as lines:
            for line in lines:
                number += 1
                if line.strip():
                    questions.append(_question(json.loads(line)))
    except (
        OSError,
        EOFError,
        ValueError,
        zlib.error,
    ) as error:  # no gzip, cut off, not UTF-8, not JSON, or not such a row
        where = f"line {number}" if number else "it"
        raise RecipeError(key, f"{file}: {where} cannot be read: {error}; mend the file") from None
    if not questions:
        raise RecipeError(key, f"{file} is empty; name a file with questions")
    return questions[: task.limit]


def _opened(file: Path) -> TextIO:
    """A file's lines, without the mark that some editors put before the first."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _question(row: Any) -> Question:
    form = 'a row is {"ctx": text, "choices": [two texts or more], "gold": index}'
    if not isinstance(row, dict) or not {"ctx", "choices", "gold"} <= set(row):
        raise ValueError(form)
    ctx, choices, gold = row["ctx"], row["choices"], row["gold"]
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not isinstance(ctx, str) or not texts or len(choices) < 2:
        raise ValueError(form)
    if len({choice.strip() for choice in choices}) < len(choices):
        raise ValueError("two of its choices are the same text, so that no model can be right by knowing")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"gold {gold!r} is no index of the {len(choices)} choices, counted from 0")
    return Question(ctx, choices, gold)


def check_tasks(section: Evaluate, *, online: bool) -> None:
    """Refuse what would fail later: a missing harness, an unknown task, a missing, empty or broken file.

    Args:
        online: also load the harness's tasks, which asks the hub for their data.
    """
    for index, task in enumerate(section.tasks):
        key = f"evaluate.tasks.{index}"
        if task.path is not None:
            read_questions(task, key)
            continue
        if find_spec("lm_eval") is None:
            raise RecipeError(
                key, f"{task.task} needs lm-eval-harness; pip install 'lm-eval>=0.4.13', or use a file (path)"
            )
        if online:
            from transmla.measure.harness import check_task

            check_task(task, key)


def digests(section: Evaluate) -> list[str | None]:
    """Of every task the digest of its file's content, so that an evaluation is made again when the file changes."""
    files = [Path(task.path or task.task or "").expanduser() for task in section.tasks]
    return [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None for file in files]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: ChoiceTask, *, key: str, budget: int, label: str
) -> Answers:
    """A model's answers to a task. budget: tokens of a batch."""
    if task.path is None:
        from transmla.measure.harness import samples_of

        return _judged(samples_of(model, tokenizer, task, budget=budget, label=label))
    questions = read_questions(task, key)
    pairs = [(question.ctx, choice) for question in questions for choice in question.choices]
    scores = iter(loglikelihoods(model, tokenizer, pairs, budget=budget, label=label))
    gold = [question.gold for question in questions]
    picks = [_pick([next(scores)[0] for _ in question.choices], question.choices) for question in questions]
    plain, normed = [pick[0] for pick in picks], [pick[1] for pick in picks]
    return Answers(
        gold,
        plain,
        normed,
        [float(pick == right) for pick, right in zip(plain, gold, strict=True)],
        [float(pick == right) for pick, right in zip(normed, gold, strict=True)],
    )


def _pick(scores: list[float], choices: list[str]) -> tuple[int, int]:
    """The likeliest choice, and the likeliest a character; the first of equals."""
    normed = [score / len(choice.lstrip()) for score, choice in zip(scores, choices, strict=True)]
    return scores.index(max(scores)), normed.index(max(normed))


def _judged(samples: list[dict[str, Any]]) -> Answers:
    """From the harness's own samples, whose verdicts are kept as they are."""
    picks = []
    for sample in samples:
        scores = [float(score) for score, _ in sample["filtered_resps"]]
        picks.append(_pick(scores, [continuation for _, continuation in sample["arguments"]]))
    normed = all("acc_norm" in sample for sample in samples)
    return Answers(
        [sample["target"] for sample in samples],
        [pick[0] for pick in picks],
        [pick[1] for pick in picks],
        [float(sample["acc"]) for sample in samples],
        [float(sample["acc_norm"]) for sample in samples] if normed else None,
    )


def answer_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Evaluate, name: str
) -> dict[str, Answers]:
    """A model's answers to all tasks, by the task's name. name: of the model, for progress bars."""
    return {
        task.label: answer(
            model,
            tokenizer,
            task,
            key=f"evaluate.tasks.{index}",
            budget=section.batch_size * section.max_length,  # the tokens that the windows of text have at a time
            label=f"{name} on {task.label}",
        )
        for index, task in enumerate(section.tasks)
    }
