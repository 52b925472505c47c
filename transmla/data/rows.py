"""Rows that a trainer sees: token ids and labels, many documents at a time; of wrapped rows the whole ones; their
numbers."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as compute
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from transmla.data.labelled import KEYS, Labeller
from transmla.data.loading import SYNTHETIC

PARALLEL = "TOKENIZERS_PARALLELISM"

ROW = "row"  # column and batch key: which row of the packed dataset this is


def token_rows(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    *,
    mark_synthetic: bool = False,
    key: str = "recover.N",
) -> Dataset:
    """Texts and conversations as the token ids and labels that trl would make of them; token ids as they are.

    There is exactly one end token after a text, whether it stood there, the tokenizer adds it or nobody does; nothing
    of a conversation is left out; and a fast tokenizer gets many texts at a time, so that it uses all cores.

    Args:
        mark_synthetic: texts of a model's own (column `synthetic`) get the label `TEACHER_ONLY`.
        key: of the stage in the recipe, for errors.

    Raises:
        RecipeError: a conversation that the chat template refuses or leaves a part of out, or a key of the trainer
            that does not fit the data.
    """
    if "input_ids" in data.column_names:
        return data.remove_columns(SYNTHETIC) if SYNTHETIC in data.column_names else data
    settings = {name: getattr(config, name) for name in KEYS}
    encode = Labeller(tokenizer, settings, set(data.column_names), mark_synthetic=mark_synthetic, key=key)
    if PARALLEL not in os.environ:
        os.unsetenv(PARALLEL)  # an earlier `map` on several processes leaves it off where Python does not see it
    with PartialState().main_process_first():  # the others find it in the cache, as trl has it
        return data.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=data.column_names,
            desc="Tokenizing train dataset",
        )


def config_of_rows(config: SFTConfig) -> SFTConfig:
    """The settings of a trainer whose rows have their labels: what they say is done, and trl would look for it."""
    config = copy.copy(config)
    config.assistant_only_loss, config.completion_only_loss, config.chat_template_path = False, None, None
    return config


def whole_rows(data: Dataset, config: SFTConfig) -> Dataset:
    """Rows of `wrapped` packing, all of one length: the short ones, which every thousand documents leave, joined and
    cut again.

    A single short row in a batch needs a mask, which costs the kernels that go without, and a compiled layer another
    graph. What is left in the end, less than a row, is dropped, unless there is nothing else.
    """
    if not config.packing or config.packing_strategy != "wrapped":
        return data
    lengths = _lengths(data)
    short, length = (lengths != config.max_length).nonzero()[0], config.max_length
    if not len(short):
        return data
    assert length is not None, "packing has a length"
    columns = data.column_names
    rest = data.select(short)[:]
    joined = {column: [token for row in rest[column] for token in row] for column in columns}
    count = len(joined["input_ids"]) // length
    cut = {
        column: [tokens[start * length : (start + 1) * length] for start in range(count)]
        for column, tokens in joined.items()
    }
    whole = data.select((lengths == length).nonzero()[0])
    if not count:
        return whole if len(whole) else data
    return concatenate_datasets([whole, Dataset.from_dict(cut, features=whole.features)])


def are_whole(data: Dataset, config: SFTConfig) -> bool:
    """Whether every row has the length that the configuration names."""
    return bool((_lengths(data) == config.max_length).all())


def _lengths(data: Dataset) -> np.ndarray:
    return compute.list_value_length(data.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]).to_numpy()


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
    internals: Any = trainer  # to transformers' annotations the columns are None
    internals._signature_columns = [*internals._signature_columns, ROW]  # other columns do not reach the collator
