"""What the recovery trainers share: trl's data preparation, a loss summed over the global batch."""

from __future__ import annotations

import functools
import math
import statistics
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from transmla.modeling.determinism import is_deterministic
from transmla.modeling.student import ATTENTION
from transmla.recover.checkpoints import AtomicCheckpoints
from transmla.recover.collator import CountingCollator
from transmla.recover.muon import MUON, MuonAdamW, is_matrix
from transmla.recover.rehearsal import rehearse
from transmla.recover.sharded_model import gathered


@dataclass
class Objective:
    """One micro-batch's share of the loss. total: sum over its tokens. tokens: how many the sum has."""

    total: Tensor
    tokens: Tensor


class RecoveryTrainer(AtomicCheckpoints, SFTTrainer, ABC):
    """trl's SFTTrainer with a loss of our own, mostly against a frozen teacher.

    The loss needs hidden states of two models, which no `forward` of transformers returns, and DDP has to see the call
    whose gradients it reduces. So the student's `forward` is patched, and leads back to the trainer's own objective:

        Trainer.training_step                                     transformers
          └─ compute_loss(model, inputs)                          this class
               └─ model(inputs=inputs, objective=True)            DDP's or peft's wrapper, where there is one
                    └─ student.forward, patched                   install_objective
                         └─ self.objective(student, inputs)       the subclass: hidden states, teacher, loss
                              └─ student.model(...)               the plain trunk
               loss = total / tokens of the global batch

    The sum is divided by the number of tokens of the global batch, over accumulation steps and processes: the same
    global batch has the same loss and gradients however it is split.

    Args:
        model: the student; adapters of `peft_config` are put around it.
        teacher: set to eval mode, never given a gradient, on the student's device; None where the loss needs none.
    """

    args: SFTConfig

    def __init__(
        self, model: PreTrainedModel, args: SFTConfig, *, teacher: PreTrainedModel | None, **kwargs: Any
    ) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self.teacher: PreTrainedModel | None = None
        if teacher is not None:
            self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, transformers must not divide it again
        self._clock: tuple[float, float] | None = None
        self.student = model  # inside peft's wrapper, where there is one
        self.peft_config = kwargs.get("peft_config")
        self.batches = CountingCollator(self.data_collator)
        self.data_collator = self.batches
        self.trunk_learning_rate = 1.0  # of the weights outside the attentions, as a share of the learning rate
        self.muon_learning_rate: float | None = None  # of the layers' matrices, as a share of their learning rate
        self.sizes: dict[str, float] | None = None  # of the weights, where the learning rate is a share of them
        self.attention: str | None = None  # what computes it over packed documents; None: there are none
        self.compiled = "layers not compiled"
        self.rehearses = False  # whether what is compiled is compiled before the first step, on the same batch always
        install_objective(model, self._gathered_objective)

    def _gathered_objective(self, student: PreTrainedModel, inputs: dict[str, Tensor]) -> Objective:
        """`objective`, where both heads can be read: inside the student's forward, and as it were the teacher's."""
        return gathered(self.teacher, lambda: self.objective(student, inputs))

    @property
    def means(self) -> str:
        """By what the stage is computed, for log and report."""
        formats = "bfloat16, trained weights in float32" if self.args.bf16 else "float32"
        attention = "" if self.attention is None else f"; attention over packed documents: {self.attention}"
        return f"{formats}; {self.compiled}{attention}{'; deterministic' if is_deterministic() else ''}"

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        """transformers' optimizer, its groups split where weights have rates of their own."""
        there = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if there:  # with DeepSpeed transformers asks twice
            return optimizer
        names = {id(value): name for name, value in self.student.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for value in group["params"]:
                name = names.get(id(value), "")
                muon = self.muon_learning_rate is not None and is_matrix(name, value)
                alike.setdefault((self._rate(name, muon), muon), []).append(value)
            groups += [
                group | {"params": own, "lr": group["lr"] * rate} | ({MUON: True} if muon else {})
                for (rate, muon), own in alike.items()
            ]
        if self.muon_learning_rate is not None:
            adamw = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay", "fused")}
            optimizer = self.optimizer = MuonAdamW(optimizer.param_groups[0]["params"][:1], **adamw)
        optimizer.param_groups = groups
        return optimizer

    def _rate(self, name: str, muon: bool) -> float:
        """Of a weight, as a share of the learning rate."""
        share = 1.0 if ATTENTION in name else self.trunk_learning_rate
        if muon:
            assert self.muon_learning_rate is not None, "only with it is a matrix Muon's"
            share *= self.muon_learning_rate
        return share * (1.0 if self.sizes is None else self.sizes[name])

    @abstractmethod
    def objective(  # type: ignore[override]  # transformers' attribute of that name is of its search for settings
        self, student: PreTrainedModel, inputs: dict[str, Tensor]
    ) -> Objective:
        """The loss of one micro-batch: `inputs` as trl's collator made them."""

    def count_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens of a collated batch the loss sums over: those whose successor has a label."""
        return (batch["labels"][:, 1:] != -100).sum()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        total: Any = sum(self.count_tokens(batch) for batch in batch_samples)
        total = total.to(device)
        return self.accelerator.gather(total).sum() if self.args.world_size > 1 else total

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' step; before the first one, the rehearsal where there is to be one."""
        if self.rehearses:
            rehearse(self, model)
            self.rehearses = False
        return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """Loss of one micro-batch as its share of the global batch's mean over tokens."""
        tokens = inputs["input_ids"].numel() if "attention_mask" not in inputs else int(inputs["attention_mask"].sum())
        outputs = model(inputs=inputs, objective=True)  # passes through the wrappers of DDP and peft
        count = outputs["tokens"] if num_items_in_batch is None else num_items_in_batch
        loss = outputs["total"] / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # it counts all processes' tokens, and DDP averages gradients
        assert self.model is not None
        if self.model.training:
            self._total_train_tokens += tokens * self.accelerator.num_processes
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self.state.log_history.append({"step": self.state.global_step, "num_tokens": self._total_train_tokens})
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second since the last line to what transformers and trl log."""
        if "loss" in logs:
            now = time.monotonic()
            if self._clock is not None:
                seconds, tokens = now - self._clock[0], self._total_train_tokens - self._clock[1]
                logs["tokens_per_second"] = round(tokens / max(seconds, 1e-9), 1)
            self._clock = (now, self._total_train_tokens)
        super().log(logs, start_time)


@torch.no_grad()
def weight_sizes(model: nn.Module) -> dict[str, float]:
    """Root mean square of every matrix by name, rounded to powers of the square root of 2, so that an optimizer has few
    groups.

    Vectors (norms, biases) get the matrices' median: a norm's weight may be a hundred times a matrix's entries, and
    what it does to the activations is done by all of them together.
    """
    found = {
        name: 2.0 ** (round(2 * math.log2(max(float(value.float().square().mean().sqrt()), 1e-12))) / 2)
        for name, value in model.named_parameters()
        if value.ndim >= 2
    }
    middle = statistics.median_low(found.values())
    return {name: found.get(name, middle) for name, _ in model.named_parameters()}


def install_objective(model: PreTrainedModel, compute: Callable[[PreTrainedModel, dict], Objective]) -> None:
    """Make `model(inputs=..., objective=True)` return the objective; every other call is as before."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *args: object, objective: bool = False, inputs: dict | None = None, **kwargs: object
    ):
        if not objective:
            return original(*args, **kwargs)
        assert inputs is not None, "the objective is one of a batch"
        result = compute(self, inputs)
        return {"total": result.total, "tokens": result.tokens}

    model.forward = types.MethodType(forward, model)
