"""What a trainer is made of besides its models and rows: optimizer, schedule, loader, reports, sampling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

# Of the student's sampling, decided by the stage or by the model.
DECIDED = {"max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "temperature", "do_sample"}
DECIDED |= {"num_return_sequences", "num_beams", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache"}


def make_parts(arguments: TrainingArguments) -> None:
    """Make everything once, of a weight of four numbers.

    Raises:
        Exception: of whatever kind the library raises for a value that it cannot use.
    """
    optimizer = _optimizer(arguments)
    _schedule(arguments, optimizer)
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        callback()  # fails where its package is not installed
    workers = arguments.dataloader_num_workers
    DataLoader(
        [0],  # type: ignore[arg-type]  # a list is a dataset to torch
        num_workers=workers,
        persistent_workers=arguments.dataloader_persistent_workers,
        prefetch_factor=arguments.dataloader_prefetch_factor if workers else None,
        multiprocessing_context=arguments.dataloader_multiprocessing_context,
    )
    if getattr(arguments, "chat_template_path", None):
        _template(Path(arguments.chat_template_path))  # type: ignore[attr-defined]  # SFTConfig's
    if hasattr(arguments, "generation_kwargs"):
        _sampling(arguments)


def _optimizer(arguments: TrainingArguments) -> Optimizer:
    make, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    if arguments.optim_args and settings == _without_extras(arguments):
        raise ValueError("this optimizer takes no optim_args")
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer: Optimizer = make([weight], **settings)
    if make.__module__.startswith(("torch.", "transformers.")):  # others may run on a GPU alone
        weight.grad = torch.ones(2, 2)
        optimizer.step()
    return optimizer


def _without_extras(arguments: TrainingArguments) -> dict[str, Any]:
    """The settings of an optimizer that nobody gives `optim_args`."""
    extras, arguments.optim_args = arguments.optim_args, None
    try:
        return Trainer.get_optimizer_cls_and_kwargs(arguments)[1]
    finally:
        arguments.optim_args = extras


def _schedule(arguments: TrainingArguments, optimizer: Optimizer) -> None:
    steps = arguments.max_steps
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]  # a dict by now
    )
    if not isinstance(schedule, LambdaLR):
        return
    places = sorted({0, 1, steps // 4, steps // 2, 3 * steps // 4, max(0, steps - 1)})
    shares = [float(share(step)) for share in schedule.lr_lambdas for step in places]
    if not all(math.isfinite(share) and share >= 0.0 for share in shares) or not any(shares):
        raise ValueError(f"the learning rate would be {', '.join(f'{share:g}' for share in shares)} of itself")


def _template(file: Path) -> None:
    from jinja2 import Environment

    Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(file.read_text(encoding="utf-8")))


def _without_generation(text: str) -> str:
    """A template without transformers' own tags, which mark the assistant's words."""
    for tag in ("generation", "endgeneration"):
        for left, right in (("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")):
            text = text.replace(f"{left} {tag} {right}", "")
    return text


def _sampling(arguments: Any) -> None:
    extra = arguments.generation_kwargs or {}
    known = GenerationConfig().to_dict()
    for name in extra:
        if name in DECIDED:
            raise ValueError(f"{name} follows from the stage; leave it out of generation_kwargs")
        if name not in known:
            raise ValueError(f"{name} is not a setting of transformers' GenerationConfig")
    settings = {
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "cache_implementation": arguments.cache_implementation,
        **extra,
    }
    GenerationConfig(max_new_tokens=1, do_sample=True, **settings).validate(strict=True)
