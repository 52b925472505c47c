"""Sets of problems with a checker, and the prompts that put them to a model."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedTokenizerBase

from transmla.data.inspection import check_dataset
from transmla.data.loading import load_one
from transmla.data.rendering import Template
from transmla.errors import RecipeError
from transmla.generate.checkers import Checker, GeneratorChecker, MathChecker, reference_answer
from transmla.generate.sandbox import is_supported
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


def require(module: str, package: str, key: str) -> None:
    """Refuse a recipe that needs a package which is not installed.

    Raises:
        RecipeError: with the command that installs it.
    """
    if find_spec(module) is None:
        raise RecipeError(key, f"{package} is not installed: pip install {package}")


def _require_sandbox(key: str) -> None:
    """Refuse problems whose scorers may evaluate what a model wrote where the kernel cannot confine that."""
    if not is_supported():
        raise RecipeError(
            key,
            "answers that a model wrote are scored behind a seccomp filter, which this machine lacks; use Linux on "
            "x86-64 or arm64",
        )


def check_problems(section: Problems, key: str, *, skip: int, limit: int | None, online: bool) -> None:
    """Everything that can be said before the problems are loaded.

    Raises:
        RecipeError: a package, a definition, a column or a generator is missing, or the rows are too few.
    """
    _require_sandbox(key)
    if section.data is not None:
        require("math_verify", "math-verify", key)
        check_dataset(section.data, f"{key}.data", online=online, problems=True)
        return
    require("reasoning_gym", "reasoning-gym", key)
    if _takes_anything(_generator(section, key)):
        raise RecipeError(
            f"{key}.generator", f"{section.generator} takes any answer for right, even '?'; use another generator"
        )
    if skip + (limit or 1) > section.size:
        rows = f"{skip} to {skip + (limit or 1)}"
        raise RecipeError(
            f"{key}.size", f"{section.size} problems have no rows {rows}; raise size, or lower skip or limit"
        )


def _generator(section: Problems, key: str) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if section.generator not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise RecipeError(f"{key}.generator", f"reasoning-gym has no {section.generator!r}; it has: {known}")
    try:
        return reasoning_gym.create_dataset(section.generator, **_arguments(section))
    except (
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
    ) as error:  # of its config's constructor and validate()
        reason = " ".join(str(error).split()) or "its validation fails"
        raise RecipeError(
            f"{key}.config", f"{section.generator} refuses it: {reason}; correct the configuration"
        ) from None


def _takes_anything(dataset: Any) -> bool:
    """Whether a generator takes an answer for right that is none; game_of_life_halting of reasoning-gym 0.1 does."""
    try:
        return bool(dataset.score_answer("?", dataset[0]) >= 1.0)
    except Exception:  # a scorer may raise anything at a word that it does not expect
        return False


def _arguments(section: Problems) -> dict[str, Any]:
    """The arguments of a generator's dataset."""
    return {"size": section.size, "seed": section.seed, **section.config}


def load_problems(section: Problems, key: str, *, skip: int = 0, limit: int | None = None) -> ProblemSet:
    """The problems `skip` to `skip + limit` of a set.

    Raises:
        RecipeError: there are no such rows.
    """
    if section.generator is not None:
        dataset = _generator(section, key)
        rows = range(len(dataset))[skip : None if limit is None else skip + limit]
        entries = [(number, dataset[number]) for number in rows]
        problems = [Problem(number, entry["question"], entry) for number, entry in entries]
        return ProblemSet(problems, GeneratorChecker(section.generator, _arguments(section), problems[0].entry))
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
