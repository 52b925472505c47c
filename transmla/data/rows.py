"""Rows that a trainer sees: token ids and labels, many documents at a time; of wrapped rows the whole ones; their
numbers."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow.compute as compute
from accelerate import PartialState
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from transmla.data.documents import ROWS
from transmla.data.labelled import KEYS, Labeller
from transmla.data.loading import SYNTHETIC
from transmla.errors import RecipeError

PARALLEL = "TOKENIZERS_PARALLELISM"

STAGE = "recover.N"  # in errors, for the key of a stage

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
    columns = set(data.column_names)
    marks = mark_synthetic and SYNTHETIC in columns
    if PARALLEL not in os.environ:
        os.unsetenv(PARALLEL)  # an earlier `map` on several processes leaves it off where Python does not see it
    with main_first(), _keys_of(key):
        # What names the file in the cache must not have the stage's key in it, or each stage would tokenise again.
        encode = Labeller(tokenizer, settings, columns, mark_synthetic=marks, key=STAGE)
        return data.map(
            encode,
            batched=True,
            batch_size=ROWS,
            writer_batch_size=ROWS,
            with_indices=True,
            remove_columns=data.column_names,
            features=Features({name: List(Value("int32")) for name in ("input_ids", "labels")}),
            num_proc=config.dataset_num_proc,
            desc="Tokenizing train dataset",
        )


@contextmanager
def main_first() -> Iterator[None]:
    """The first process goes before the others, which then find in Datasets' cache what it made. All must enter; an
    error of the first one does not leave them waiting."""
    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_main_process:
            state.wait_for_everyone()


@contextmanager
def _keys_of(key: str) -> Iterator[None]:
    """Errors about `STAGE` become errors about a stage."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(key + error.key.removeprefix(STAGE), error.problem) from None


def config_of_rows(config: SFTConfig) -> SFTConfig:
    """The settings of a trainer whose rows have their labels: what they say is done, and trl would look for it."""
    config = copy.copy(config)
    config.assistant_only_loss, config.completion_only_loss, config.chat_template_path = False, None, None
    config.dataset_num_proc = None  # packing by several processes would make other rows, and takes seconds per GB
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
    rest = data.select(short).with_format("numpy")[:]
    joined = {column: np.concatenate(rest[column]) for column in data.column_names}
    count = len(joined["input_ids"]) // length
    whole = data.select((lengths == length).nonzero()[0])
    if not count:
        return whole if len(whole) else data
    cut = {column: list(tokens[: count * length].reshape(count, length)) for column, tokens in joined.items()}
    return concatenate_datasets([whole, Dataset.from_dict(cut, features=whole.features)])


def are_whole(data: Dataset, config: SFTConfig) -> bool:
    """Whether every row has the length that the configuration names."""
    return bool((_lengths(data) == config.max_length).all())


def _lengths(data: Dataset) -> np.ndarray:
    batches = data.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000)
    return np.concatenate([compute.list_value_length(batch["input_ids"]).to_numpy() for batch in batches])


def attach_rows(data: Dataset) -> Dataset:
    """Number the rows of a packed dataset in a column `row`."""
    with main_first():  # a shuffled dataset is written anew for it
        return data.add_column(ROW, np.arange(len(data)))


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
