"""Rows that a trainer sees: text as token ids, many documents at a time; of wrapped rows the whole ones; their numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pyarrow.compute as compute
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from transmla.data.sources import SYNTHETIC

PARALLEL = "TOKENIZERS_PARALLELISM"
ROW = "row"  # column and batch key: which row of the packed dataset this is
TEACHER_ONLY = -200  # label of a token that is scored against the teacher alone; not trl's -100, which is not scored at all


def token_rows(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, config: SFTConfig, *, mark_synthetic: bool = False
) -> Dataset:
    """Texts as the token ids and labels that trl would make of them, an end token after each; all else as it is.

    trl calls the tokenizer for one text after the other; given many, a fast one uses all cores.

    Args:
        mark_synthetic: texts of a model's own (column `synthetic`) get the label `TEACHER_ONLY`.
    """
    changed = config.eos_token is not None or config.chat_template_path is not None or bool(config.dataset_kwargs)
    if "text" not in data.column_names or changed or tokenizer.eos_token is None:
        return data.remove_columns(SYNTHETIC) if SYNTHETIC in data.column_names else data
    end = tokenizer.eos_token
    if PARALLEL not in os.environ:
        os.unsetenv(PARALLEL)  # an earlier `map` on several processes leaves it off where Python does not see it

    def encode(rows: dict[str, list]) -> dict[str, list[list[int]]]:
        texts = [text if text.endswith(end) else text + end for text in rows["text"]]
        ids = tokenizer(texts, verbose=False)["input_ids"]
        own = rows[SYNTHETIC] if mark_synthetic and SYNTHETIC in rows else [False] * len(ids)
        labels = [[TEACHER_ONLY] * len(row) if by_model else row for row, by_model in zip(ids, own, strict=True)]
        return {"input_ids": ids, "labels": labels}

    return data.map(encode, batched=True, remove_columns=data.column_names, desc="Tokenizing train dataset")


def whole_rows(data: Dataset, config: SFTConfig) -> Dataset:
    """Packed rows without the short ones that `wrapped` leaves, one for every thousand documents.

    A single short row in a batch needs a mask, which costs the kernels that go without, and a compiled layer another graph.
    Where there are none but short rows they stay.
    """
    if not config.packing or config.packing_strategy != "wrapped":
        return data
    lengths = compute.list_value_length(data.with_format("arrow")[:]["input_ids"]).to_numpy()
    whole = (lengths == config.max_length).nonzero()[0]
    return data if len(whole) in (0, len(data)) else data.select(whole)


def attach_rows(data: Dataset) -> Dataset:
    """Number the rows of a packed dataset in a column `row`."""
    return data.add_column(ROW, list(range(len(data))))


class RowCollator:
    """A data collator whose batches carry `row`, the numbers of their rows: a list, which stays on the CPU.

    Args:
        collate: the trainer's own collator.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [example[ROW] for example in examples]
        batch = self.collate([{name: value for name, value in example.items() if name != ROW} for example in examples])
        return batch | {ROW: rows}


def carry_rows(trainer: SFTTrainer) -> None:
    """Make the batches of a trainer carry `row`, which `RecordedTeacher.rows` takes. Call it before training."""
    trainer.train_dataset = attach_rows(trainer.train_dataset)
    trainer.data_collator = RowCollator(trainer.data_collator)
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, ROW]  # other columns do not reach the collator
