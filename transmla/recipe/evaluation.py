"""The `evaluate` section of a recipe: text, tasks with choices, problems to solve, thresholds that must be met."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from transmla.recipe.base import Section
from transmla.recipe.bounds import Batch, Count, Length, Number, Tokens, Whole, Window
from transmla.recipe.folder_name import FolderName, PathText
from transmla.recipe.writing import Solve

FILES = (".jsonl", ".jsonl.gz")

AVERAGE = "average"  # the mean over all names of a measure


def _some_words(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("an empty prompt has nothing to continue; remove it")
    return prompt


Prompt = Annotated[str, AfterValidator(_some_words)]


class ChoiceTask(Section):
    """Questions with choices: a task of lm-eval-harness, or a file.

    task: name of a task or group of the harness, or of a YAML file that it can read.
    num_fewshot: solved examples before each question; None: as the task says. A task that fixes it at 0 keeps 0.
    path: a `.jsonl` or `.jsonl.gz` file of rows {"ctx": text, "choices": [text, ...], "gold": index}. The choice
        follows `ctx` immediately, so it begins with its space.
    name: under which the report shows it; the task's or the file's own name where it is left out.
    limit: only the first so many questions (of each task of a group).
    """

    task: PathText | None = None
    path: PathText | None = None
    name: FolderName | None = None
    num_fewshot: Annotated[Whole, Field(ge=0, le=1000)] | None = None
    limit: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, tree: Any) -> Any:
        return ({"path": tree} if tree.endswith(FILES) else {"task": tree}) if isinstance(tree, str) else tree

    @model_validator(mode="after")
    def _one_source(self) -> ChoiceTask:
        if (self.task is None) == (self.path is None):
            raise ValueError("give exactly one of task (of lm-eval-harness) and path (a file)")
        if self.path is not None and not self.path.endswith(FILES):
            raise ValueError(f"path must end in {' or '.join(FILES)}")
        if self.path is not None and self.num_fewshot is not None:
            raise ValueError("num_fewshot is for tasks of the harness; a file's ctx says everything")
        if self.label == AVERAGE:
            raise ValueError(f"{AVERAGE} is the mean over the tasks; choose another name")
        return self

    @property
    def label(self) -> str:
        """The name in report and thresholds."""
        if self.name is not None:
            return self.name
        return self.task if self.task is not None else Path(self.path or "").name.partition(".jsonl")[0]


class Requirement(Section):
    """A threshold that a model of the run must meet; a miss is exit code 1, after the report is written.

    measure: `kl` in nats per token; `perplexity_ratio`, the model's over the teacher's; `top1` in per cent;
        `accuracy_drop`, teacher minus model in percentage points; `solve_recovered`, model over teacher in per cent.
    data: a name of `evaluate.data`, of `evaluate.tasks` or of `evaluate.solve`, by the measure; or `average`.
    """

    measure: Literal["kl", "perplexity_ratio", "top1", "accuracy_drop", "solve_recovered"]
    data: str
    model: Literal["recovered", "exported"] = "recovered"
    at_most: Number | None = None
    at_least: Number | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Requirement:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("give exactly one of at_most and at_least")
        if self.measure in ("top1", "solve_recovered") and 0 < self.bound <= 1:
            raise ValueError(f"{self.measure} is in per cent: write {100 * self.bound:g}, not {self.bound:g}")
        return self

    @property
    def bound(self) -> float:
        """The threshold itself."""
        bound = self.at_most if self.at_least is None else self.at_least
        assert bound is not None
        return bound

    def met_by(self, value: float | None) -> bool:
        """Whether a value meets it; what was not measured does not."""
        if value is None or math.isnan(value):
            return False
        return value <= self.bound if self.at_least is None else value >= self.bound

    def describe(self) -> str:
        """The threshold in words."""
        side = "at most" if self.at_least is None else "at least"
        return f"{self.measure} of {self.model} on {self.data} {side} {self.bound:g}"


def check_names(tasks: list[ChoiceTask]) -> list[ChoiceTask]:
    """The tasks, when no two have one name.

    Raises:
        ValueError: two have.
    """
    labels = [task.label for task in tasks]
    double = next((label for label in labels if labels.count(label) > 1), None)
    if double is not None:
        raise ValueError(f"two tasks are called {double}; give one of them a name")
    return tasks


def check_once(names: list[str]) -> list[str]:
    """The names, when none is there twice.

    Raises:
        ValueError: one is.
    """
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{double} is named twice; name it once")
    return names


class Evaluate(Section):
    """Quality of teacher, converted, recovered and exported model on the same windows and the same questions."""

    data: Annotated[list[PathText], AfterValidator(check_once)]
    tasks: Annotated[list[ChoiceTask], AfterValidator(check_names)] = []
    require: list[Requirement] = []
    tokens: Tokens = 90_112  # a dataset
    max_length: Window = 2048
    batch_size: Batch = 1
    prompts: Annotated[
        list[Prompt], Field(max_length=1000)
    ] = []  # text the exported model continues, greedily, for the report
    max_new_tokens: Length = 48
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100.0)] = (
        1.2  # small models go round in circles under greedy decoding
    )
    solve: list[Solve] = []  # problems whose answers are checked
    streaming: bool | Literal["auto"] = "auto"  # read models layer by layer; auto: where teacher and student do not fit

    @property
    def generated(self) -> list[str]:
        """Keys of what needs a whole model in memory, and is left out where models are read layer by layer."""
        return [f"evaluate.{name}" for name in ("tasks", "solve", "prompts") if getattr(self, name)]
