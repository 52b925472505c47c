"""What a stage's token budget means in tokens of a micro-batch, rows of a step, and steps."""

from __future__ import annotations

from transmla.recipe.stages import AnyStage, OnPolicy


def micro_batch(stage: AnyStage) -> int:
    """Tokens a device handles at a time."""
    if isinstance(stage, OnPolicy):
        length = stage.prompt_tokens + stage.max_new_tokens
    else:
        length = int(stage.trainer.get("max_length", 1024))
    return length * int(stage.trainer.get("per_device_train_batch_size", 1))


def rows_of_a_step(stage: AnyStage) -> int:
    """Rows that one process handles in an optimizer step."""
    return int(stage.trainer.get("per_device_train_batch_size", 1)) * int(
        stage.trainer.get("gradient_accumulation_steps", 1)
    )


def steps_of(stage: AnyStage, processes: int) -> int:
    """Optimizer steps that the stage's token budget gives, at least one."""
    batch = micro_batch(stage) * int(stage.trainer.get("gradient_accumulation_steps", 1)) * processes
    return max(1, stage.tokens // batch)
