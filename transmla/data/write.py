"""What an entry of a recipe's `write` asks a model, and the rows that come of what it wrote."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from transmla.data.answers import accepts
from transmla.data.generate import Sample, batch_seed, batches
from transmla.data.problems import ProblemSet, messages_of, normal, opening, prompt_text, stored_prompt
from transmla.data.sources import load_many
from transmla.data.windows import documents
from transmla.errors import RecipeError
from transmla.recipe_write import Problems, Text, Traces, is_synthetic

DATA, DEFINITION = "data.jsonl", "data.yaml"  # of an artifact below `written`
CHARACTERS = 16  # of text that surely hold a token of it
CUT = "\ufffd"  # what is left of a letter whose last bytes are in the next token
HERE = "{}"  # in a cue: where the prefix stands; without it the cue follows the prefix
COLUMNS = {"completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}


class Questions:
    """Prompts of a problem set, `samples` times each, in batches of like length."""

    def __init__(
        self, found: ProblemSet, section: Problems, tokenizer: PreTrainedTokenizerBase, *, samples: int, batch_size: int
    ) -> None:
        self.found, self.section, self.tokenizer, self.samples = found, section, tokenizer, samples
        texts = [prompt_text(problem, section, tokenizer) for problem in found.problems]
        self.texts = [text for text, _ in texts]
        self.begun = [begun for _, begun in texts]
        encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in self.texts]
        self.prompts = [prompt for prompt in encoded for _ in range(samples)]
        self.plan = batches([len(prompt) for prompt in self.prompts], batch_size)

    def prompts_of(self, batch: int) -> list[list[int]]:
        """Token ids of a batch's prompts."""
        return [self.prompts[index] for index in self.plan[batch]]

    def ordered(self, parts: Iterable[list[Sample]]) -> list[Sample]:
        """Samples of all batches, in the order of the problems. parts: by batch."""
        found: dict[int, Sample] = {}
        for plan, samples in zip(self.plan, parts, strict=True):
            found |= dict(zip(plan, samples, strict=True))
        return [found[index] for index in range(len(self.prompts))]

    def reply(self, index: int, sample: Sample) -> str:
        """The text of a sample, with what the prompt began it with."""
        text = self.tokenizer.decode(sample.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self.begun[index // self.samples] + text

    def accepted(self, index: int, sample: Sample) -> bool:
        """Whether a sample ended by itself and its answer is right."""
        entry = self.found.problems[index // self.samples].entry
        return sample.finished and accepts(self.found.checker, self.reply(index, sample), entry, self.section)


def write_traces(
    asked: Questions, samples: list[Sample], entry: Traces, heldout: set[str], folder: Path
) -> dict[str, int]:
    """Write the traces that are kept below `folder`.

    Args:
        samples: in the order of the problems.
        heldout: questions, in `normal` form, that are evaluated on and must not be in the data.

    Returns:
        counts: problems, written, finished, accepted, duplicates, held_out, kept, tokens (of the kept replies).
    """
    counts = dict.fromkeys(("problems", "written", "finished", "accepted", "duplicates", "held_out", "kept", "tokens"), 0)
    counts["problems"] = len(asked.found.problems)
    seen: set[str] = set()
    with (folder / DATA).open("w", encoding="utf-8") as lines:
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
            row = _row(asked, index, reply, entry) | {"problem": problem.number, "accepted": right, "finished": sample.finished}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    _define(folder, COLUMNS[entry.format], entry)
    return counts


def _row(asked: Questions, index: int, reply: str, entry: Traces) -> dict[str, Any]:
    number = index // asked.samples
    if entry.format == "messages":
        messages = messages_of(asked.found.problems[number], asked.section)
        begun = opening(asked.section)
        if not reply.lstrip().startswith(begun.strip()):  # the chat template wrote it, but a message has to hold it
            reply = begun + reply
        return {"messages": [*messages, {"role": "assistant", "content": reply}]}
    prompt = stored_prompt(asked.texts[number], asked.tokenizer).removesuffix(asked.begun[number])
    return {"text": prompt + reply} if entry.format == "text" else {"prompt": prompt, "completion": reply}


class Starts:
    """Starts of the texts that a teacher writes by itself, for as many batches as are asked for."""

    def __init__(self, entry: Text, tokenizer: PreTrainedTokenizerBase, *, seed: int, key: str) -> None:
        """
        Args:
            entry: with definitions in the place of `@NAME` in its prefix_data.
            key: of the entry in the recipe, for errors.

        Raises:
            RecipeError: the tokenizer has no token to start with.
        """
        self.entry, self.tokenizer, self.seed = entry, tokenizer, seed
        self.data: Dataset | None = None
        if entry.prefix_data:
            self.data = load_many(entry.prefix_data, f"{key}.prefix_data")
            generator = torch.Generator().manual_seed(batch_seed(seed, f"order of {entry.name}", 0))
            self.order = torch.randperm(len(self.data), generator=generator).tolist()
        starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        if self.data is None and not starts:
            raise RecipeError(f"{key}.prefix_tokens", "the tokenizer has no start or end token; give prefix_data and prefix_tokens")
        self.start = starts[:1]
        self.cues = [_after_a_word(cue, tokenizer) for cue in entry.cues]
        self.made: dict[int, list[array]] = {}  # by batch, 4 bytes a token: they are asked for again when the text is put together

    def prompts_of(self, batch: int) -> list[list[int]]:
        """Token ids of a batch's prompts: prefixes, with a cue after or around each where the entry has cues."""
        if batch not in self.made:
            found = self._prefixes(batch)
            if self.cues:
                found = self._cued(found, batch)
            self.made[batch] = [array("i", prompt) for prompt in found]
        return [prompt.tolist() for prompt in self.made[batch]]

    def _cued(self, prefixes: list[list[int]], batch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(batch_seed(self.seed, f"cues of {self.entry.name}", batch))
        drawn = torch.randint(len(self.cues), (len(prefixes),), generator=generator).tolist()
        found = [prefix + self.cues[cue] for prefix, cue in zip(prefixes, drawn, strict=True)]
        around = [place for place, cue in enumerate(drawn) if HERE in self.entry.cues[cue]]
        # What has words before it begins with another token than what has not: these are texts first, and tokens then.
        texts = decoded([self.without_start(prefixes[place]) for place in around], self.tokenizer)
        texts = [self.entry.cues[drawn[place]].replace(HERE, text.removesuffix(CUT)) for place, text in zip(around, texts, strict=True)]
        for place, tokens in zip(around, documents(Dataset.from_dict({"text": texts}), self.tokenizer), strict=True):
            found[place] = tokens
        return found

    def without_start(self, tokens: list[int]) -> list[int]:
        """A text's tokens without the start token: the tokenizer adds it again."""
        return tokens[1:] if tokens[:1] == self.start else tokens

    def _prefixes(self, batch: int) -> list[list[int]]:
        size = self.entry.batch_size
        if self.data is None:
            return [list(self.start) for _ in range(size)]
        wanted = [self.order[(batch * size + place) % len(self.order)] for place in range(size)]
        if "text" in self.data.column_names:  # books are long: their first words alone would be few
            generator = torch.Generator().manual_seed(batch_seed(self.seed, f"prefixes of {self.entry.name}", batch))
            unlike = sorted(set(wanted))  # a few long texts are asked for again and again
            texts = dict(zip(unlike, self.data.select(unlike)["text"], strict=True))
            pieces = [piece(texts[row], CHARACTERS * self.entry.prefix_tokens, generator) for row in wanted]
            rows = Dataset.from_dict({"text": pieces})
        else:
            rows = self.data.select(wanted)
        found = [document[: self.entry.prefix_tokens] for document in documents(rows, self.tokenizer)]
        return [document or list(self.start) for document in found]


def _after_a_word(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that follows another: some tokenizers would begin one that stands alone with a space."""
    word, both = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("a", "a" + text))
    return both[len(word) :] if both[: len(word)] == word else tokenizer(text, add_special_tokens=False)["input_ids"]


def piece(text: str, length: int, generator: torch.Generator) -> str:
    """`length` characters of a text, from the first word after a random place."""
    if len(text) <= length:
        return text
    place = int(torch.randint(len(text) - length + 1, (), generator=generator))
    words = re.compile(r"\s+").search(text, place) if place else None
    start = words.end() if words is not None and words.end() + length <= len(text) else place
    return text[start : start + length]


def write_text(starts: Starts, parts: Iterator[tuple[list[list[int]], list[Sample]]], folder: Path) -> dict[str, int]:
    """Write documents, token ids and text, below `folder`.

    Args:
        parts: prompts and samples of every batch in turn.

    Returns:
        counts: written, finished, duplicates, kept, tokens (that were drawn, of the kept documents).
    """
    counts = dict.fromkeys(("written", "finished", "duplicates", "kept", "tokens"), 0)
    tokenizer, seen = starts.tokenizer, set()
    with (folder / DATA).open("w", encoding="utf-8") as lines:
        for prompts, samples in parts:
            whole = [prompt + sample.tokens for prompt, sample in zip(prompts, samples, strict=True)]
            texts = decoded([starts.without_start(tokens) for tokens in whole], tokenizer)
            for tokens, text, sample in zip(whole, texts, samples, strict=True):
                counts["written"] += 1
                counts["finished"] += sample.finished
                same = normal(text)
                if not same or same in seen:
                    counts["duplicates"] += 1
                    continue
                seen.add(same)
                counts["kept"] += 1
                counts["tokens"] += len(sample.tokens) + sample.finished
                row = {"text": text, "tokens": tokens, "finished": sample.finished}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    _define(folder, COLUMNS["text"], starts.entry)
    return counts


def decoded(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The exact texts of many token lists, on all cores where the tokenizer can; transformers decodes one after another."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        return fast.decode_batch(rows, skip_special_tokens=False)
    return [tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows]


def _define(folder: Path, columns: tuple[str, ...], entry: Traces | Text) -> None:
    """The data definition beside the rows, by which stages, and other recipes, read them."""
    content = {"path": DATA, "columns": {name: name for name in columns}, "about": "Written by the recipe's teacher."}
    if is_synthetic(entry):
        content["synthetic"] = True
    (folder / DEFINITION).write_text(yaml.safe_dump(content))
