"""Token ids and labels of the rows that a stage trains on, as trl makes them of its three kinds of data."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from transmla.data.conversations import tools_of, unpack
from transmla.data.documents import adds_end, one_end
from transmla.data.loading import SYNTHETIC
from transmla.data.rendering import Rendered, Template
from transmla.errors import RecipeError

IGNORED = -100  # trl's label of a token that is not scored

TEACHER_ONLY = -200  # label of a token that is scored against the teacher alone; not one that is not scored at all

Batch = dict[str, list]


# Keys of a trainer that say what of a row is learnt.
KEYS = ("completion_only_loss", "assistant_only_loss", "chat_template_path", "eos_token")


def training_tokenizer(
    tokenizer: PreTrainedTokenizerBase, trainer: Mapping[str, Any], key: str
) -> PreTrainedTokenizerBase:
    """A tokenizer with the chat template and the end token that a trainer names, where it does.

    Raises:
        RecipeError: the template is no file, or the tokenizer has no such token.
    """
    template, end = trainer.get("chat_template_path"), trainer.get("eos_token")
    if template is None and end is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if end is not None:
        if end not in tokenizer.get_vocab():
            raise RecipeError(
                f"{key}.trainer.eos_token", f"{end} is no token of the tokenizer; name one, or leave it out"
            )
        tokenizer.eos_token = end
    if template is not None:
        file = Path(os.path.expanduser(template))
        if file.suffix not in (".jinja", ".j2") or not os.path.isfile(file):
            raise RecipeError(
                f"{key}.trainer.chat_template_path",
                f"{template} is no file that ends in .jinja; write the template into one (another tokenizer's tokens "
                "are not those of the model)",
            )
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{key}.trainer.chat_template_path", f"{file} cannot be read: {error}") from None
    return tokenizer


class Labeller:
    """From a batch of records to `input_ids` and `labels`: a function for `Dataset.map`, with indices.

    A text is scored whole; a conversation too, or with `assistant_only_loss` what the assistant says; of a prompt with
    its completion the completion, unless `completion_only_loss` is false.

    Args:
        trainer: the keys `KEYS` of a trainer, where they are set.
        columns: of the data. mark_synthetic, key: as in `transmla.data.rows.token_rows`.

    Raises:
        RecipeError: a key of the trainer does not fit the data.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        trainer: Mapping[str, Any],
        columns: set[str],
        *,
        mark_synthetic: bool = False,
        key: str,
    ) -> None:
        # What it adds by itself is the end token that it came with.
        self.added = tokenizer.eos_token_id if adds_end(tokenizer) else None
        self.tokenizer = training_tokenizer(tokenizer, trainer, key)
        self.key, self.mark_synthetic = key, mark_synthetic
        self.end, self.end_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        pairs = {"prompt", "completion"} <= columns
        if trainer.get("completion_only_loss") and not pairs:
            raise RecipeError(
                f"{key}.trainer.completion_only_loss",
                "it is for prompts with completions, and the data has none; leave it out",
            )
        self.completion_only = pairs and trainer.get("completion_only_loss") is not False
        self.assistant_only = bool(trainer.get("assistant_only_loss"))
        if self.assistant_only and "text" in columns:
            raise self._not_conversations()

    def _not_conversations(self) -> RecipeError:
        reason = "it is for conversations, and the data is text; leave it out"
        return RecipeError(f"{self.key}.trainer.assistant_only_loss", reason)

    @cached_property
    def template(self) -> Template:
        """The chat template, which marks what the assistant says where only that is learnt.

        Raises:
            RecipeError: it marks nothing.
        """
        return Template(self.tokenizer, marks=self._marks() if self.assistant_only else None)

    def _marks(self) -> str:
        own: Any = self.tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if own is not None and has_generation_markers(own):
            return own
        try:
            return get_training_chat_template(self.tokenizer) or own
        except (ValueError, TypeError):  # trl knows the templates of some families; of none it is a TypeError
            raise RecipeError(
                f"{self.key}.trainer.assistant_only_loss",
                "the chat template does not mark what the assistant says ({% generation %}); name one that does "
                "(trainer.chat_template_path), or leave it out",
            ) from None

    def __call__(self, rows: Batch, numbers: list[int]) -> Batch:
        """The ids and labels of a batch of records; numbers: which rows of the dataset they are, from 0."""
        if "text" in rows:
            return self._texts(rows)
        if "prompt" in rows and isinstance(rows["prompt"][0], str):
            return self._pairs(rows["prompt"], rows["completion"])
        return self._conversations(
            [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)], numbers
        )

    def _ended(self, text: str) -> str:
        return text if self.end is None or text.endswith(self.end) else text + self.end

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of plain texts, without an end token that the tokenizer adds by itself."""
        ids = self.tokenizer(texts, verbose=False)["input_ids"]
        return [row[:-1] if self.added is not None and row[-1:] == [self.added] else row for row in ids]

    def _whole_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of plain texts, with exactly one end token at the end."""
        return [one_end(row, self.end_id) for row in self._ids([self._ended(text) for text in texts])]

    def _texts(self, rows: Batch) -> Batch:
        ids = self._whole_ids(rows["text"])
        own = rows[SYNTHETIC] if self.mark_synthetic and SYNTHETIC in rows else [False] * len(ids)
        labels = [[TEACHER_ONLY] * len(row) if by_model else row for row, by_model in zip(ids, own, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def _pairs(self, prompts: list[str], completions: list[str]) -> Batch:
        if self.assistant_only:
            raise self._not_conversations()
        before = self._ids(prompts)
        ids = self._whole_ids([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
        return {"input_ids": ids, "labels": [self._after(prompt, row) for prompt, row in zip(before, ids, strict=True)]}

    def _after(self, prompt: list[int], ids: list[int]) -> list[int]:
        """Labels of a row: what follows the tokens that it has in common with its prompt alone."""
        if not self.completion_only:
            return ids
        same = next((at for at, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other), None)
        start = min(len(prompt), len(ids)) if same is None else same
        return [IGNORED] * start + ids[start:]

    def _conversations(self, rows: list[dict[str, Any]], numbers: list[int]) -> Batch:
        prompts, wholes = [], []
        _ = self.template  # a template that marks nothing is no fault of the first row
        for row, number in zip(rows, numbers, strict=True):
            try:
                prompt, whole = self.rendered(row)
            except ValueError as error:
                raise RecipeError(f"{self.key}.data", f"row {number + 1}: {error}") from None
            prompts.append(prompt)
            wholes.append(whole)
        encoded = self._encoded([whole.text for whole in wholes], return_offsets_mapping=self.assistant_only)
        ids = encoded["input_ids"]
        labels = ids
        if self.completion_only:
            before = self._encoded(prompts)["input_ids"]
            labels = [self._after(prompt, row) for prompt, row in zip(before, ids, strict=True)]
        if self.assistant_only:
            said = [_said(*both) for both in zip(wholes, encoded["offset_mapping"], strict=True)]
            mute = next((number for number, marks in zip(numbers, said, strict=True) if not any(marks)), None)
            if mute is not None:
                raise RecipeError(
                    f"{self.key}.data",
                    f"row {mute + 1}: the assistant says nothing in it, and assistant_only_loss learns nothing else; "
                    "leave such rows out",
                )
            labels = [
                [label if own else IGNORED for label, own in zip(row, marks, strict=True)]
                for row, marks in zip(labels, said, strict=True)
            ]
        return {"input_ids": ids, "labels": labels}

    def rendered(self, row: dict[str, Any]) -> tuple[str, Rendered]:
        """The prompt of a conversation, where it has one, and all of it.

        Raises:
            ValueError: the chat template refuses it, or leaves a part of it out.
        """
        if "messages" in row:
            return "", self.template.render(unpack(row, "messages"), tools_of(row))
        return self.template.render_pair(unpack(row, "prompt"), unpack(row, "completion"), tools_of(row))

    def _encoded(self, texts: list[str], **more: Any) -> dict[str, list]:
        return dict(self.tokenizer(texts, add_special_tokens=False, verbose=False, **more))  # the template wrote them


def _said(whole: Rendered, offsets: list[tuple[int, int]]) -> list[bool]:
    """Of every token, whether the assistant says it. offsets: first letter and one after the last."""
    return [any(first < end and start < last for first, last in whole.spans) for start, end in offsets]
