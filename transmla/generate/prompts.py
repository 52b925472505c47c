"""What an entry of a recipe's `write`, or of `evaluate.solve`, asks a model."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from threading import Lock

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from transmla.data.documents import documents, token_ids
from transmla.data.loading import load_many
from transmla.errors import RecipeError
from transmla.generate.checkers import accepts
from transmla.generate.problems import ProblemSet, prompt_text
from transmla.generate.sampler import Sample, batch_seed, batches
from transmla.recipe.writing import Problems, Text

CHARACTERS, FEW = 16, 6  # of text to a token: that surely hold one; that mostly do

MARGIN = 8  # tokens before the end of a part of a text that may be others than in the whole

CUT = "\ufffd"  # what is left of a letter whose last bytes are in the next token

HERE = "{}"  # in a cue: where the prefix stands; without it the cue follows the prefix


class ProblemPrompts:
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
        return self.begun[index // self.samples] + _decoded(sample.tokens, self.tokenizer)

    def accepted(self, index: int, sample: Sample) -> bool:
        """Whether a sample ended by itself and its answer is right."""
        entry = self.found.problems[index // self.samples].entry
        return sample.finished and accepts(self.found.checker, self.reply(index, sample), entry, self.section)


class TextPrompts:
    """Starts of the texts that a teacher writes by itself, for as many batches as are asked for."""

    def __init__(self, entry: Text, tokenizer: PreTrainedTokenizerBase, *, seed: int, key: str) -> None:
        """
        Args:
            entry: with definitions in the place of `@NAME` in its prefix_data.
            key: of the entry in the recipe, for errors.

        Raises:
            RecipeError: the tokenizer has no token to start with.
        """
        self.entry, self.tokenizer, self.seed, self.key = entry, tokenizer, seed, key
        self.data: Dataset | None = None
        if entry.prefix_data:
            self.data = load_many(entry.prefix_data, f"{key}.prefix_data")
            generator = torch.Generator().manual_seed(batch_seed(seed, f"order of {entry.name}", 0))
            self.order = torch.randperm(len(self.data), generator=generator).tolist()
        starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        if self.data is None and not starts:
            raise RecipeError(
                f"{key}.prefix_tokens", "the tokenizer has no start or end token; give prefix_data and prefix_tokens"
            )
        self.start = starts[:1]
        self.cues = [_after_a_word(cue, tokenizer) for cue in entry.cues]
        # By batch, 4 bytes a token: another thread asks for them again for the rows of the text.
        self.made: dict[int, list[array]] = {}
        self._making = Lock()

    def prompts_of(self, batch: int) -> list[list[int]]:
        """Token ids of a batch's prompts: prefixes, with a cue after or around each where the entry has cues."""
        if batch not in self.made:
            with self._making:
                if batch not in self.made:
                    self.made[batch] = [array("i", prompt) for prompt in self._make(batch)]
        return [prompt.tolist() for prompt in self.made[batch]]

    def _make(self, batch: int) -> list[list[int]]:
        found = self._prefixes(batch)
        return self._cued(found, batch) if self.cues else found

    def _cued(self, prefixes: list[list[int]], batch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(batch_seed(self.seed, f"cues of {self.entry.name}", batch))
        drawn = torch.randint(len(self.cues), (len(prefixes),), generator=generator).tolist()
        found = [prefix + self.cues[cue] for prefix, cue in zip(prefixes, drawn, strict=True)]
        around = [place for place, cue in enumerate(drawn) if HERE in self.entry.cues[cue]]
        # What has words before it begins with another token than what has not: these are texts first, and tokens then.
        texts = decoded([self.without_start(prefixes[place]) for place in around], self.tokenizer)
        texts = [
            self.entry.cues[drawn[place]].replace(HERE, text.removesuffix(CUT))
            for place, text in zip(around, texts, strict=True)
        ]
        for place, tokens in zip(around, self._tokens(texts), strict=True):
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
            texts = dict(zip(unlike, self.data.select(unlike)["text"][:], strict=True))
            pieces = [piece(texts[row], CHARACTERS * self.entry.prefix_tokens, generator) for row in wanted]
            found = self._first_tokens(pieces)
        else:
            try:
                found = list(documents(self.data.select(wanted), self.tokenizer))
            except ValueError as error:
                raise RecipeError(f"{self.key}.prefix_data", str(error)) from None
        return [document[: self.entry.prefix_tokens] or list(self.start) for document in found]

    def _first_tokens(self, texts: list[str]) -> list[list[int]]:
        """`prefix_tokens` tokens of every text, or more, or all that it has. Most of a text need not be tokenised."""
        few = FEW * self.entry.prefix_tokens
        found = self._tokens([text[:few] for text in texts])
        short = [
            place
            for place, (text, tokens) in enumerate(zip(texts, found, strict=True))
            if len(text) > few and len(tokens) < self.entry.prefix_tokens + MARGIN
        ]
        for place, tokens in zip(short, self._tokens([texts[place] for place in short]), strict=True):
            found[place] = tokens
        return found

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return token_ids(texts, self.tokenizer)


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


def decoded(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The exact texts of many token lists, on all cores where the tokenizer can; transformers decodes one after
    another."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        return fast.decode_batch(rows, skip_special_tokens=False)
    return [_decoded(row, tokenizer) for row in rows]


def _decoded(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The exact text of one token list."""
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
