"""The rows that come of what a model wrote, and the data definition by which stages read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transmla.generate.problems import messages_of, normal, opening, stored_prompt
from transmla.generate.prompts import ProblemPrompts, TextPrompts, decoded
from transmla.generate.sampler import Sample
from transmla.recipe.writing import AnyWriting, Text, Traces, is_synthetic

COLUMNS = {"completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
# What is counted: replies or texts, how many ended by themselves, ...; tokens: of what is kept.
TRACE_COUNTS = ("problems", "written", "finished", "accepted", "duplicates", "held_out", "kept", "tokens")
TEXT_COUNTS = ("written", "finished", "duplicates", "kept", "tokens")


def trace_rows(
    asked: ProblemPrompts, samples: list[Sample], entry: Traces, heldout: set[str], counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """The replies that are kept, as rows.

    Args:
        samples: in the order of the problems.
        heldout: questions, in `normal` form, that are evaluated on and must not be in the data.
        counts: `TRACE_COUNTS`, added to as rows are taken.
    """
    counts["problems"] = len(asked.found.problems)
    seen: set[str] = set()
    for index, sample in enumerate(samples):
        problem = asked.found.problems[index // asked.samples]
        right = asked.accepted(index, sample)
        counts["written"] += 1
        counts["finished"] += sample.finished
        counts["accepted"] += right
        if not {"accepted": right, "finished": sample.finished, "all": True}[entry.keep]:
            continue
        if normal(problem.question) in heldout:
            counts["held_out"] += 1
            continue
        reply = asked.reply(index, sample)
        same = normal(problem.question + "\n" + reply)
        if same in seen:
            counts["duplicates"] += 1
            continue
        seen.add(same)
        counts["kept"] += 1
        counts["tokens"] += len(sample.tokens)
        facts = {"problem": problem.number, "accepted": right, "finished": sample.finished}
        yield _columns_of(asked, index, reply, entry) | facts


def _columns_of(asked: ProblemPrompts, index: int, reply: str, entry: Traces) -> dict[str, Any]:
    number = index // asked.samples
    if entry.format == "messages":
        messages = messages_of(asked.found.problems[number], asked.section)
        begun = opening(asked.section)
        if not reply.lstrip().startswith(begun.strip()):  # the chat template wrote it, but a message has to hold it
            reply = begun + reply
        return {"messages": [*messages, {"role": "assistant", "content": reply}]}
    prompt = stored_prompt(asked.texts[number], asked.tokenizer).removesuffix(asked.begun[number])
    return {"text": prompt + reply} if entry.format == "text" else {"prompt": prompt, "completion": reply}


class TextRows:
    """Documents as rows, batch after batch: text, and the token ids that were sampled. A text that came before is left
    out.

    counts: `TEXT_COUNTS` of the batches that were asked for.
    """

    def __init__(self, prompts: TextPrompts) -> None:
        self.prompts = prompts
        self.counts = dict.fromkeys(TEXT_COUNTS, 0)
        self._seen: set[str] = set()

    def of(self, batch: int, samples: list[Sample]) -> Iterator[dict[str, Any]]:
        """The rows of the next batch, whose number its prompts follow from."""
        prompts, counts = self.prompts, self.counts
        starts = prompts.prompts_of(batch)
        whole = [start + sample.tokens for start, sample in zip(starts, samples, strict=True)]
        texts = decoded([prompts.without_start(tokens) for tokens in whole], prompts.tokenizer)
        for tokens, text, sample in zip(whole, texts, samples, strict=True):
            counts["written"] += 1
            counts["finished"] += sample.finished
            same = normal(text)
            if not same or same in self._seen:
                counts["duplicates"] += 1
                continue
            self._seen.add(same)
            counts["kept"] += 1
            counts["tokens"] += len(sample.tokens) + sample.finished
            yield {"text": text, "tokens": tokens, "finished": sample.finished}


def definition_of(entry: AnyWriting, file: str) -> dict[str, Any]:
    """The data definition of the rows of an entry. file: where they are, beside the definition."""
    columns = COLUMNS["text"] if isinstance(entry, Text) else COLUMNS[entry.format]
    content: dict[str, Any] = {"path": file, "columns": {name: name for name in columns}}
    content["about"] = "Written by the recipe's teacher."
    if is_synthetic(entry):
        content["synthetic"] = True
    return content
