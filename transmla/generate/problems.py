"""Sets of problems with a checker, and the prompts that put them to a model."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from transmla.data.loading import load_one
from transmla.data.rendering import Template
from transmla.errors import RecipeError
from transmla.generate.checkers import Checker, GeneratorChecker, MathChecker, reference_answer
from transmla.generate.problem_checks import arguments_of, generator_of
from transmla.recipe.writing import Problems


@dataclass(frozen=True)
class Problem:
    """One problem. number: its row in the set. entry: what the checker needs."""

    number: int
    question: str
    entry: dict[str, Any]


@dataclass(frozen=True)
class ProblemSet:
    """Problems in the order of their rows, and who checks the answers."""

    problems: list[Problem]
    checker: Checker


def load_problems(section: Problems, key: str, *, skip: int = 0, limit: int | None = None) -> ProblemSet:
    """The problems `skip` to `skip + limit` of a set.

    Raises:
        RecipeError: there are no such rows.
    """
    if section.generator is not None:
        dataset = generator_of(section, key)
        rows = range(len(dataset))[skip : None if limit is None else skip + limit]
        entries = [(number, dataset[number]) for number in rows]
        problems = [Problem(number, entry["question"], entry) for number, entry in entries]
        return ProblemSet(problems, GeneratorChecker(section.generator, arguments_of(section), problems[0].entry))
    assert section.data is not None, "the schema wants one of the two"
    data = load_one(section.data, f"{key}.data")
    if len(data) < skip + (limit or 1):
        raise RecipeError(key, f"{section.data} has {len(data)} rows, not {skip + (limit or 1)}; lower skip or limit")
    chosen = range(skip, len(data) if limit is None else skip + limit)
    problems = [
        Problem(number, row["problem"], {"answer": reference_answer(row["answer"])})
        for number, row in zip(chosen, data.select(chosen), strict=True)
    ]
    return ProblemSet(problems, MathChecker())


def messages_of(problem: Problem, section: Problems) -> list[dict[str, str]]:
    """The conversation that puts a problem."""
    system = [{"role": "system", "content": section.system}] if section.system else []
    return [*system, {"role": "user", "content": section.asked.replace("{problem}", problem.question)}]


def opening(section: Problems) -> str:
    """What a reply is begun with: the tag before the reasoning, or nothing."""
    return section.think.partition("{thought}")[0] if section.think else ""


def prompt_text(problem: Problem, section: Problems, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The prompt as text, special tokens included, and what of it the reply is begun with.

    A tokenizer without a chat template, as base models have, gets system and message as paragraphs.

    Raises:
        ValueError: the template refuses it, as one that knows no system messages.
    """
    messages = messages_of(problem, section)
    begun = opening(section)
    if tokenizer.chat_template is None:
        start = tokenizer.bos_token if _adds_start(tokenizer) else ""
        text = start + "".join(f"{message['content']}\n\n" for message in messages)
    else:
        text = Template(tokenizer).put(messages, [])
        if begun.strip() and text.rstrip().endswith(begun.strip()):  # R1's template begins the reasoning itself
            return text, ""
    return text + begun, begun


def stored_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as a trainer should get it: without the start token that the tokenizer will add again."""
    return text.removeprefix(tokenizer.bos_token) if _adds_start(tokenizer) else text


def _adds_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    start = tokenizer.bos_token_id
    return start is not None and tokenizer("a", verbose=False)["input_ids"][0] == start


def normal(text: str) -> str:
    """Text for comparison: one form of every character, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
