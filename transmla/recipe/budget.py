"""What a stage's token budget means in tokens of a micro-batch, rows of a step, and steps."""

from __future__ import annotations

from transmla.recipe.stages import AnyStage, OnPolicy

ROW_LENGTH = 1024  # tokens of a row where a stage does not say, as trl has it


def micro_batch(stage: AnyStage) -> int:
    """Tokens a device handles at a time."""
    if isinstance(stage, OnPolicy):
        length = stage.prompt_tokens + stage.max_new_tokens
    else:
        length = int(stage.trainer.get("max_length", ROW_LENGTH))
    return length * int(stage.trainer.get("per_device_train_batch_size", 1))


def rows_of_a_step(stage: AnyStage) -> int:
    """Rows that one process handles in an optimizer step."""
    return int(stage.trainer.get("per_device_train_batch_size", 1)) * int(
        stage.trainer.get("gradient_accumulation_steps", 1)
    )


def tokens_of_a_step(stage: AnyStage, processes: int) -> int:
    """Tokens that all processes handle in an optimizer step."""
    return micro_batch(stage) * int(stage.trainer.get("gradient_accumulation_steps", 1)) * processes


def steps_of(stage: AnyStage, processes: int) -> int:
    """Optimizer steps that the stage's token budget gives, at least one."""
    return max(1, stage.tokens // tokens_of_a_step(stage, processes))
