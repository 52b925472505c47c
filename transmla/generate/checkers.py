"""Whether a reply's final answer is right: mathematics by math-verify, generated puzzles by their generator."""

from __future__ import annotations

import re
from typing import Any, Protocol

from transmla.generate.scoring import ScoringProcess, mathematics
from transmla.generate.scoring_process import Limits, Task
from transmla.recipe.writing import Problems

HASHED = re.compile(r"####[ \t]*(\S[^\n]*)")

STATED = re.compile(r"\b(?:final answer|answer)(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)

AMOUNT = re.compile(r"[$€£\s]*(-?\d[\d,]*(?:\.\d+)?)(?:\s+[A-Za-z]{3,})+\.?")  # a number with its unit in words

NOT_A_NUMBER = re.compile(r"\bnanj?\b", re.IGNORECASE)

MARKS = re.compile(r"[\s*]*")  # between `answer:` and the answer

BRACES = re.compile(r"\\f?boxed\s*\{|(?<!\\)[{}]")


def boxed(text: str) -> str | None:
    """The content of the last whole \\boxed{}, braces inside it included; None where there is none."""
    found: tuple[int, int] | None = None
    opened: list[tuple[int, bool]] = []  # places behind braces that are open, and whether they are of a box
    for brace in BRACES.finditer(text):
        if brace.group() != "}":
            opened.append((brace.end(), len(brace.group()) > 1))
        elif opened:
            start, is_box = opened.pop()
            if is_box and (found is None or start > found[0]):
                found = start, brace.start()
    return None if found is None else text[found[0] : found[1]].strip()


def tagged(text: str) -> str | None:
    """What stands between the last <answer> and </answer>; None where they are not both there."""
    *before, _ = text.split("</answer>")
    for part in reversed(before):
        _, sign, answer = part.partition("<answer>")
        if sign:
            return answer
    return None


def stated(text: str) -> str | None:
    """What follows the last `answer is` or `answer:` on its line, without stars and a full stop; None without one."""
    found, place = None, 0
    while (sign := STATED.search(text, place)) is not None:
        marks = MARKS.match(text, sign.end())
        assert marks is not None, "it matches nothing, too"
        start, place = marks.end(), text.find("\n", marks.end())
        place = len(text) if place < 0 else place
        while place > start and (text[place - 1] in "*." or text[place - 1].isspace()):
            place -= 1
        found = text[start:place] or found
    return found


def final_answer(reply: str) -> str | None:
    """The answer that a reply gives: the last \\boxed{}, else <answer>, else after ####, else after `answer is` or
    `answer:`. None: it gives none, and a number somewhere in the text is not taken for one.

    The time is linear in the length of the reply, whatever a model repeats in it.
    """
    box = boxed(reply)
    if box is not None:
        return box or None
    answer = tagged(reply)
    if answer is None:
        hashed = HASHED.findall(reply)
        answer = hashed[-1] if hashed else stated(reply)
    return None if answer is None else answer.strip() or None


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
        amount = AMOUNT.fullmatch(answer)
        answer = amount.group(1) if amount else answer
        if "".join(answer.split()) == "".join(entry["answer"].split()):
            return True
        return mathematics()(answer, entry)


class GeneratorChecker:
    """The score of a reasoning-gym generator, of which only the full one counts. entry: the generator's."""

    def __init__(self, generator: str, arguments: dict[str, Any], example: dict[str, Any]) -> None:
        """
        Args:
            arguments: of the generator's dataset. example: one of its entries.
        """
        self.process = ScoringProcess(Task((generator, arguments), (example["answer"], example), Limits()))

    def __call__(self, answer: str, entry: dict[str, Any]) -> bool:
        if NOT_A_NUMBER.search(answer) and not NOT_A_NUMBER.search(str(entry["answer"])):
            return False  # no distance to it is above a threshold, so some generators score it as right
        return self.process(answer, entry)


def accepts(checker: Checker, reply: str, entry: dict[str, Any], section: Problems) -> bool:
    """Whether a reply ends its reasoning, gives an answer, and gives the right one."""
    spoken = without_thought(reply, section.think)
    answer = None if spoken is None else final_answer(spoken)
    return answer is not None and checker(answer, entry)
