"""Tasks of lm-eval-harness, with the project's own scorer as the model.

The harness asks a model for log-likelihoods alone; it makes the prompts and decides what is right. Its own `HFLM` would
do too (a test compares the two), but computes logits of every position in the model's number format, and looks for
devices and processes that the pipeline has placed already.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.errors import RecipeError
from transmla.measure.choices import loglikelihoods
from transmla.recipe.evaluation import ChoiceTask


class Scorer(LM):
    """A loaded model as the harness sees it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, budget: int, label: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.budget, self.label = model, tokenizer, budget, label

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        return loglikelihoods(self.model, self.tokenizer, pairs, budget=self.budget, label=self.label)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("tasks with choices do not ask for it, and others are refused before")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise AssertionError("tasks with choices do not ask for it, and others are refused before")


@cache
def _manager(file: str | None) -> TaskManager:
    """The index of all tasks, which takes seconds to read; a YAML file needs none of it."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=file is None)


def _manager_of(task: ChoiceTask) -> TaskManager:
    assert task.task is not None
    return _manager(task.task if Path(task.task).suffix in (".yaml", ".yml") else None)


def check_task(task: ChoiceTask, key: str) -> None:
    """Load a task and its data, which later come from the cache.

    Raises:
        RecipeError: there is no such task, its data cannot be loaded, or it is none of choices.
    """
    try:
        loaded = _manager_of(task).load([task.task])["tasks"]
    except KeyError:
        raise RecipeError(
            key, f"lm-eval-harness has no task {task.task!r}; `lm-eval ls tasks` lists them, a file is given as path"
        ) from None
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # the hub's and datasets' derive from these
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(key, f"cannot load the data of {task.task}: {reason}; use a file (path) instead") from None
    for name, one in loaded.items():
        if one.OUTPUT_TYPE != "multiple_choice" or "acc" not in one.aggregation():
            raise RecipeError(key, f"{name} is no task of choices with an accuracy; evaluate.tasks takes those alone")


def samples_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: ChoiceTask, *, budget: int, label: str
) -> list[dict[str, Any]]:
    """The harness's own record of every question of a task or of all tasks of a group."""
    results = simple_evaluate(
        model=Scorer(model, tokenizer, budget=budget, label=label),
        tasks=[task.task],
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        bootstrap_iters=0,
        task_manager=_manager_of(task),
    )
    assert results is not None, "only the first process evaluates"
    return [sample for samples in results["samples"].values() for sample in samples]
