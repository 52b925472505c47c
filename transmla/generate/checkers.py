"""Whether a reply's final answer is right: mathematics by math-verify, generated puzzles by their generator."""

from __future__ import annotations

import re
from typing import Any, Protocol

from transmla.recipe.writing import Problems

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

HASHED = re.compile(r"####[ \t]*(\S[^\n]*)")

STATED = re.compile(r"\b(?:final answer|answer)(?:\s+is\b\s*:?|\s*:)[\s*]*([^\n]*[^\s*.])", re.IGNORECASE)

AMOUNT = re.compile(r"[$€£\s]*(-?\d[\d,]*(?:\.\d+)?)(?:\s+[A-Za-z]{3,})+\.?")  # a number with its unit in words


def boxed(text: str) -> str | None:
    """The content of the last whole \\boxed{}, braces inside it included; None where there is none."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth, place = 1, start
        while place < len(text):
            escaped = text[place - 1] == "\\"
            depth += 0 if escaped else (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[start:place].strip()
            place += 1
    return None


def final_answer(reply: str) -> str | None:
    """The answer that a reply gives: the last \\boxed{}, else <answer>, else after ####, else after `answer is` or
    `answer:`. None: it gives none, and a number somewhere in the text is not taken for one."""
    box = boxed(reply)
    if box is not None:
        return box or None
    for form in (TAGGED, HASHED, STATED):
        found = form.findall(reply)
        if found:
            return found[-1].strip() or None
    return None


def reference_answer(text: str) -> str:
    """The answer in a row of a problem set: after #### (GSM8K), in the last \\boxed{} of a solution (MATH), or as it
    is."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().replace(",", "")
    box = boxed(text)
    return text.strip() if box is None else box


def without_thought(reply: str, think: str | None) -> str | None:
    """What follows the reasoning; None where the reasoning never ended. think: `Problems.think`."""
    if think is None:
        return reply
    closing = think.partition("{thought}")[2].strip()
    head, sign, rest = reply.rpartition(closing)
    return rest if sign else None


class Checker(Protocol):
    """Says whether a final answer to a problem is right. entry: the problem's, from the set that made it."""

    def __call__(self, answer: str, entry: dict[str, Any]) -> bool: ...


class MathChecker:
    """Equality of mathematical expressions. entry: `answer`, the reference."""

    def __call__(self, answer: str, entry: dict[str, Any]) -> bool:
        from math_verify import parse, verify

        amount = AMOUNT.fullmatch(answer)
        answer = amount.group(1) if amount else answer
        if "".join(answer.split()) == "".join(entry["answer"].split()):
            return True
        right, given = (parse(f"\\boxed{{{text}}}") for text in (entry["answer"], answer))
        return bool(right and given and verify(right, given))


class GeneratorChecker:
    """The score of a reasoning-gym generator, of which only the full one counts. entry: the generator's."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, answer: str, entry: dict[str, Any]) -> bool:
        return self.dataset.score_answer(answer, entry) >= 1.0


def accepts(checker: Checker, reply: str, entry: dict[str, Any], section: Problems) -> bool:
    """Whether a reply ends its reasoning, gives an answer, and gives the right one."""
    spoken = without_thought(reply, section.think)
    answer = None if spoken is None else final_answer(spoken)
    return answer is not None and checker(answer, entry)
