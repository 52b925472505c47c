"""What an interrupted stage goes on from, on as many processes as before or on others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transmla.errors import RecipeError
from transmla.recipe.launch_file import layout
from transmla.recipe.stages import AnyStage

ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True)
class Origin:
    """checkpoint: the newest whole one, if any. processes: how many the stage's steps were counted for."""

    checkpoint: Path | None
    processes: int

    def same_batches(self, stage: AnyStage, processes: int) -> AnyStage:
        """The stage with as many micro-batches per step on these processes as have the rows of a step on the first."""
        if processes == self.processes:
            return stage
        count = int(stage.trainer.get(ACCUMULATION, 1)) * self.processes // processes
        return stage.model_copy(update={"trainer": stage.trainer | {ACCUMULATION: count}})

    def accumulation(self, stage: AnyStage, processes: int, folder: Path, key: str) -> None:
        """Refuse to go on where the format, or the rows of a step, do not allow another number of processes.

        Raises:
            RecipeError: says on how many it can go on.
        """
        anew = f"start as many, or delete {folder} to train the stage anew"
        if layout() != "fsdp2":
            raise RecipeError(
                "launch", f"DeepSpeed's checkpoints of {self.processes} processes are no good for {processes}; {anew}"
            )
        batches = int(stage.trainer.get(ACCUMULATION, 1)) * self.processes
        if batches % processes:
            raise RecipeError(
                f"{key}.trainer.{ACCUMULATION}",
                f"its checkpoints are of {self.processes} processes, whose {batches} micro-batches of a step cannot be "
                f"shared out among {processes}; {anew}",
            )
