"""On-policy distillation: the student continues prompts, and learns the teacher's distribution on what it wrote."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DistillationConfig, DistillationTrainer

from transmla.data.conversations import Turn, tools_of, unpack
from transmla.data.documents import adds_end
from transmla.data.rendering import Template
from transmla.errors import RecipeError
from transmla.modeling.student import share_trunk, train_only
from transmla.recipe.launch_file import layout, load_whole
from transmla.recipe.stages import OnPolicy
from transmla.recover.arguments import DEFAULTS, OWN, common_arguments
from transmla.recover.checkpoints import AtomicCheckpoints
from transmla.recover.configuration import unchanged_configuration
from transmla.recover.last_step import REMEDY, require_finite, train_to_the_end
from transmla.recover.sharded_model import kept_whole


class OnPolicyTrainer(AtomicCheckpoints, DistillationTrainer):
    """trl's trainer on prompts that are token ids, with models of mixed dtypes.

    The loss is the mean over the global batch's sampled tokens, over accumulation steps and processes.
    """

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if not self.sharded:
            return super()._generate_single_turn(*args, **kwargs)
        assert self.model is not None
        with kept_whole(self.model):  # processes stop at lengths of their own: none gathers for another
            return super()._generate_single_turn(*args, **kwargs)

    def _get_last_hidden_state(self, unwrapped_model: nn.Module, *args: object, **kwargs: object) -> Tensor:
        # trl calls the trunk itself, past the forward that accelerate has put into autocast: trained weights are
        # float32, frozen ones bfloat16.
        with self.accelerator.autocast():
            return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)


def on_policy_config(
    stage: OnPolicy,
    folder: Path,
    *,
    seed: int,
    device: str,
    dtype: torch.dtype,
    processes: int,
    kind: type[DistillationConfig] = DistillationConfig,
) -> DistillationConfig:
    """trl's own configuration object for a stage. kind: its class, or one derived from it."""
    config = kind(
        max_completion_length=stage.max_new_tokens,
        temperature=stage.temperature,
        beta=stage.beta,
        **common_arguments(stage, folder, seed=seed, device=device, dtype=dtype, processes=processes),
        **(DEFAULTS | {"shuffle_dataset": False} | stage.trainer | OWN),  # the prompts come in the order of training
    )
    load_whole()
    return config


def prompt_ids(stage: OnPolicy, data: Dataset, tokenizer: PreTrainedTokenizerBase, key: str) -> list[list[int]]:
    """The prompts of a dataset as token ids, each at most `prompt_tokens` long.

    Args:
        data: text, messages, or prompt and completion.
        key: recipe key, for errors.

    Raises:
        RecipeError: there is none, or the chat template refuses one; names the row.
    """
    found = list(prompts_of(stage, data, tokenizer, key))
    if not found:
        raise RecipeError(
            key,
            f"no prompt can be made with prompt_tokens {stage.prompt_tokens}; raise it for conversations, lower "
            f"it for text",
        )
    return found


def prompts_of(stage: OnPolicy, data: Dataset, tokenizer: PreTrainedTokenizerBase, key: str) -> Iterator[list[int]]:
    """The prompts of `prompt_ids`, one after the other; a conversation is put as it is to a model that answers it.

    Raises:
        RecipeError: the chat template refuses a prompt; names the row.
    """
    template, added = Template(tokenizer), tokenizer.eos_token_id if adds_end(tokenizer) else None

    def encoded(text: str, *, special: bool) -> list[int]:
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids[:-1] if special and added is not None and ids[-1:] == [added] else ids

    for number, row in enumerate(data, 1):
        if "text" in row:
            ids = encoded(row["text"], special=True)
            for start in range(0, len(ids), stage.prompt_tokens + stage.max_new_tokens):
                piece = ids[start : start + stage.prompt_tokens]
                if len(piece) == stage.prompt_tokens:
                    yield piece
            continue
        if isinstance(row.get("prompt"), str):
            ids = encoded(row["prompt"], special=True)
        else:
            prompt = prompt_turns(row)
            if not prompt:
                continue
            try:
                ids = encoded(template.put(prompt, tools_of(row)), special=False)  # the template writes them itself
            except ValueError as error:
                raise RecipeError(key, f"row {number}: {error}") from None
        if 0 < len(ids) <= stage.prompt_tokens:
            yield ids


def prompt_turns(row: dict[str, Any]) -> list[Turn]:
    """The prompt of a row that is a conversation; empty where it has none."""
    return unpack(row, "prompt") if "prompt" in row else _before_the_answer(unpack(row, "messages"))


def _before_the_answer(messages: list[Turn]) -> list[Turn]:
    """A conversation up to the last turn of the assistant; empty where there is none, or nothing before it."""
    answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    before = messages[: answers[-1]] if answers else []
    return before if any(turn["role"] == "user" for turn in before) else []


def prompt_order(prompts: list[list[int]], count: int, seed: int) -> Dataset:
    """`count` prompts, every one before any comes again, in an order by the seed; column `prompt`.

    One pass is the whole training: trl's sampler would begin a second pass's order anew after a resume, and leave out
    the prompts that do not fill a global batch.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(prompts), generator=generator).tolist()
    return Dataset.from_dict({"prompt": [prompts[index] for index in order[:count]]})


def build_on_policy(
    stage: OnPolicy,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DistillationConfig,
    data: Dataset,
    *,
    key: str = "recover.N.data",
) -> OnPolicyTrainer:
    """The trainer of a stage. Trained weights are float32 masters; the trunk is shared while it stays frozen.

    Args:
        data: text, messages, or prompt and completion.
        key: recipe key, for errors.

    Raises:
        RecipeError: no prompt can be made of the data.
    """
    way = layout()
    if stage.train == "attention" and way in ("whole", "zero2"):
        share_trunk(student, teacher)
    train_only(student, stage.train)
    if way == "whole":
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    prompts = prompt_ids(stage, data, tokenizer, key)
    trainer = OnPolicyTrainer(
        student,
        teacher.eval().requires_grad_(False),
        config,
        train_dataset=prompt_order(prompts, config.max_steps * batch * config.world_size, config.seed),
        processing_class=copy.deepcopy(tokenizer),  # trl sets a padding token where there is none
    )
    # Under ZeRO-3 trl has put the teacher in shards.
    trainer.into_shards(student, teacher if way == "fsdp2" else None, attentions=False)
    return trainer


def run_on_policy(
    trainer: OnPolicyTrainer, dtype: torch.dtype, checkpoint: Path | None = None, *, key: str = "recover.N"
) -> dict[str, Any]:
    """Train to the last step, from a checkpoint if there is one; the student ends in `dtype` and eval mode.

    Args:
        key: of the stage in the recipe, for errors.

    Returns:
        tokens seen (prompts and continuations), the log: loss, entropy, length of continuations by step; how many
        checkpoints were written, and the seconds that training stood still for them.

    Raises:
        RecipeError: training was stopped before its end, its loss or weights are not finite, or a checkpoint could
            not be written.
    """
    train_to_the_end(trainer, checkpoint, key)
    student = trainer.accelerator.unwrap_model(trainer.model)
    for model in (student, trainer.accelerator.unwrap_model(trainer.teacher_model)):
        vars(model).pop("forward", None)  # accelerate's and trl's replacements; back to the class's own
        vars(model).pop("_original_forward", None)
    trainer.leave_shards(dtype, key=key, remedy=REMEDY)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    student.eval()
    if not trainer.in_parts:
        require_finite(student, key)
    state, start = trainer.state, None if checkpoint is None else str(checkpoint)
    found = {"tokens": state.num_input_tokens_seen, "log": state.log_history, "resumed_from": start}
    return found | {"checkpoints": trainer.stalls}


def train_on_policy(
    stage: OnPolicy,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    folder: Path,
    checkpoint: Path | None = None,
    *,
    key: str,
    seed: int,
    device: str,
    dtype: torch.dtype,
    processes: int,
) -> dict[str, Any]:
    """A whole stage: build the trainer, train `student` in place.

    Args:
        folder: of the checkpoints. checkpoint: where training goes on from.
        key: of the stage in the recipe, for errors.

    Returns:
        as `run_on_policy`.

    Raises:
        RecipeError: no prompt can be made of the data; as `run_on_policy`.
    """
    config = on_policy_config(stage, folder, seed=seed, device=device, dtype=dtype, processes=processes)
    with unchanged_configuration(student, teacher):
        trainer = build_on_policy(stage, student, teacher, tokenizer, config, data, key=f"{key}.data")
        return run_on_policy(trainer, dtype, checkpoint, key=key)
