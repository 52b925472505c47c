"""Record a teacher's top-k log-probabilities, on the rows that a distillation stage trains on and in their order."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from transmla.data.rows import ROW, carry_rows, config_of_rows, token_rows, whole_rows
from transmla.modeling.config_facts import final_softcap
from transmla.modeling.kernels.eager import cap
from transmla.recipe.budget import micro_batch
from transmla.recipe.stages import Distill
from transmla.recover.collator import kept_of, scored, trunk_inputs
from transmla.recover.losses import ELEMENTS, logits_float32
from transmla.recover.stage import trainer_config
from transmla.recover.teachers.shards import ShardAppender, data_digest, encode, vocabulary_digest

SHARD_POSITIONS = 65_536  # scored positions a shard


def packed_trainer(data: Dataset, tokenizer: PreTrainedTokenizerBase, config: SFTConfig) -> SFTTrainer:
    """trl's trainer for the sake of its packed dataset and its order of rows, around a model of no importance."""
    dimensions: dict[str, Any] = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=max(len(tokenizer), 8), **dimensions))
    tokenizer = copy.deepcopy(tokenizer)
    data = token_rows(data, tokenizer, config)
    args = config_of_rows(config)
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train_dataset = whole_rows(trainer.train_dataset, config)
    carry_rows(trainer)
    return trainer


def rows_needed(stage: Distill, rows: int) -> int:
    """How many of a packed dataset's rows the stage's budget reaches, whatever the number of processes. rows: of
    all."""
    batch = int(stage.trainer.get("per_device_train_batch_size", 1))
    step = batch * int(stage.trainer.get("gradient_accumulation_steps", 1))
    return min(rows, max(step, batch * math.ceil(stage.tokens / micro_batch(stage))))


def training_batches(trainer: Trainer, wanted: int) -> Iterator[dict[str, Any]]:
    """The first batches of the first epoch that together have `wanted` rows."""
    seen = 0
    for batch in trainer.get_train_dataloader():
        if seen >= wanted:
            return
        seen += len(batch[ROW])
        yield batch


@torch.no_grad()
def top_log_probabilities(teacher: PreTrainedModel, batch: dict[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities at every position whose successor has a label: ids and logp [n, k], on the
    CPU."""
    states = teacher.model(**trunk_inputs(batch), use_cache=False).last_hidden_state
    hidden = kept_of(states[:, :-1], scored(batch))
    head, softcap = teacher.get_output_embeddings().weight, final_softcap(teacher.config)
    ids, logp = [], []
    for part in hidden.split(max(1, ELEMENTS // len(head))):
        scores = cap(logits_float32(part, head), softcap).log_softmax(-1)
        largest = scores.topk(k, dim=-1)
        ids.append(largest.indices.cpu())
        logp.append(largest.values.float().cpu())
    empty = torch.empty(0, k)
    return torch.cat(ids or [empty.long()]), torch.cat(logp or [empty])


def positions_by_row(trainer: SFTTrainer, rows: list[int]) -> list[int]:
    """Scored positions of rows of the packed dataset, each collated by itself."""
    data: Dataset = trainer.train_dataset
    alone = [trainer.data_collator([data[row]]) for row in rows]
    return [len(scored(batch)) for batch in alone]


def record_teacher(
    folder: Path,
    stage: Distill,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    load_teacher: Callable[[], PreTrainedModel],
    *,
    inputs: dict[str, Any],
    vocabulary: int,
    key: str,
    seed: int,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Record a stage's teacher into `folder`; what an earlier run has recorded there is kept.

    Args:
        data: text, messages, or prompt and completion, as the stage gets it.
        load_teacher: called only where a row is missing.
        inputs: what else the recording depends on, checked by whoever reads it.
        vocabulary: rows of the teacher's head.
        key: recipe key, for errors.

    Returns:
        rows, positions and bytes of the whole recording.

    Raises:
        RecipeError: the folder holds a recording of something else.
    """
    k = min(stage.record.top_k, vocabulary)
    config = trainer_config(stage, folder, seed=seed, device=device, dtype=dtype, processes=1)
    trainer = packed_trainer(data, tokenizer, config)
    packed: Dataset = trainer.train_dataset
    inputs = inputs | {
        "vocabulary": vocabulary_digest(tokenizer),
        "packed data": data_digest(packed),
        "top_k": k,
        "dtype": stage.record.dtype,
    }
    shards = ShardAppender(folder, inputs, key)
    shards.index["data_rows"] = len(packed)
    done, teacher = shards.rows, None
    rows, counts, blobs = [], [], []
    for batch in training_batches(trainer, rows_needed(stage, len(packed))):
        if set(batch[ROW]) <= done:
            continue
        teacher = teacher or load_teacher()
        sizes = positions_by_row(trainer, batch[ROW])
        ids, logp = top_log_probabilities(teacher, batch, k)
        for row, own, scores in zip(batch[ROW], ids.split(sizes), logp.split(sizes), strict=True):
            if row not in done:
                done.add(row)
                rows.append(row)
                counts.append(len(own))
                blobs.append(encode(own, scores, stage.record.dtype))
        if sum(counts) >= SHARD_POSITIONS:
            shards.add(rows, counts, blobs)
            rows, counts, blobs = [], [], []
    if rows:
        shards.add(rows, counts, blobs)
    index = shards.index["shards"]
    return {
        "rows": sum(len(shard["rows"]) for shard in index),
        "positions": sum(sum(shard["positions"]) for shard in index),
        "bytes": sum(sum(shard["bytes"]) for shard in index),
    }
