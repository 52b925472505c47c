"""Compile on the same batch, wherever a stage goes on: a kernel for any length is cut for the first that it meets."""

from __future__ import annotations

import torch
from torch import nn
from trl import SFTTrainer


def rehearse(trainer: SFTTrainer, model: nn.Module) -> None:
    """One forward and backward pass over the first rows of the data, which leaves nothing behind but compiled kernels.

    How a compiled kernel splits a sum over tokens follows from the length of the batch that it was compiled for. A
    resumed run meets another batch first than the unbroken one did, and its sums would differ in their last bits.

    Args:
        model: the student as the trainer calls it, inside its wrappers.
    """
    data = trainer._remove_unused_columns(trainer.train_dataset, description="training")
    rows = [data[index % len(data)] for index in range(trainer.args.per_device_train_batch_size)]
    counted = trainer._total_train_tokens
    cards = [trainer.args.device.index or 0] if trainer.args.device.type == "cuda" else []
    model.train()
    with torch.random.fork_rng(devices=cards), trainer.accelerator.no_sync(model):
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
    model.zero_grad(set_to_none=True)
    trainer._total_train_tokens = counted
