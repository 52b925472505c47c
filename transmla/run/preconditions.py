"""What can be refused once the source's small files are there, before any weight is loaded."""

from __future__ import annotations

from accelerate.utils import gather_object

from transmla.errors import RecipeError
from transmla.measure.tasks import read_questions
from transmla.plan.device_memory import misfit
from transmla.plan.launched import launch_of_environment
from transmla.recipe.budget import rows_of_a_step, steps_of
from transmla.recipe.stages import is_recorded, other_teacher
from transmla.recover.teachers.shards import RecordedTeacher, check_inputs
from transmla.run.context import Run
from transmla.run.lineage import students_to_make, texts_to_make
from transmla.run.room import check_room
from transmla.run.text_preconditions import check_calibration, check_evaluation_text, check_training, check_writing
from transmla.sources.fetch import fetch
from transmla.sources.tokenizer import load_tokenizer


def check_before_weights(run: Run) -> None:
    """Refuse data, teachers and recordings that would fail in a later stage.

    Raises:
        RecipeError: the first of them.
    """
    _check_tokens(run)
    check_writing(run, texts_to_make(run))
    if -1 in students_to_make(run):
        run.prepared.streaming.require()
        check_calibration(run)
    check_training(run, students_to_make(run))
    check_evaluation_text(run)
    _check_teachers(run)
    _check_recordings(run)
    _check_questions(run)
    check_room(run)
    _check_devices(run)


def _check_devices(run: Run) -> None:
    """What is to be trained must fit on the device of every process."""
    prepared, launch, refused = run.prepared, launch_of_environment(), None
    for index in sorted(students_to_make(run)):
        if index < 0 or refused is not None:
            continue
        stage = run.recipe.recover[index]
        reason = misfit(stage, prepared.sizes, prepared.config, prepared.dtype, prepared.device, launch)
        refused = None if reason is None else (f"recover.{index}", reason)
    everywhere = [found for found in gather_object([refused]) if found is not None]
    if everywhere:  # devices may differ in what others hold of them; all processes end
        raise RecipeError(*everywhere[0])


def _check_teachers(run: Run) -> None:
    """A teacher must read the source's tokens."""
    wanted = students_to_make(run)
    for index, stage in enumerate(run.recipe.recover):
        other = other_teacher(stage)
        if other is not None and index in wanted:
            key = f"recover.{index}.teacher"
            tokenizer = load_tokenizer(fetch(other, key), f"{key}.source")
            if tokenizer.get_vocab() != run.tokenizer.get_vocab():
                raise RecipeError(
                    key,
                    f"{other.source} has another tokenizer than the source; name one that shares it",
                )


def _check_tokens(run: Run) -> None:
    """Tokens that a trainer names must be the tokenizer's."""
    known = run.tokenizer.get_vocab()
    for index, stage in enumerate(run.recipe.recover):
        for name in ("eos_token", "pad_token"):
            token = stage.trainer.get(name)
            if token is not None and token not in known:
                raise RecipeError(
                    f"recover.{index}.trainer.{name}",
                    f"{token} is no token of the tokenizer; name one, or leave it out",
                )


def _check_questions(run: Run) -> None:
    """A question without a context is put after the start or end token."""
    if run.tokenizer.bos_token_id is not None or run.tokenizer.eos_token_id is not None:
        return
    for index, task in enumerate(run.recipe.evaluate.tasks):
        key = f"evaluate.tasks.{index}"
        if task.path is not None and not all(question.ctx.strip() for question in read_questions(task, key)):
            raise RecipeError(key, "a question has no context, and the tokenizer no token to put it after; give one")


def _check_recordings(run: Run) -> None:
    """A recording must be there, of the same inputs, and long enough."""
    wanted = students_to_make(run)
    for index, stage in enumerate(run.recipe.recover):
        if not is_recorded(stage) or index not in wanted:
            continue
        key, folder = f"recover.{index}.record", run.paths.recording(index)
        recorded = RecordedTeacher(folder, key)
        recorded.check_content()
        check_inputs(folder, recorded.index, key, settings=run.digests.recording(index))
        have = sum(len(shard["rows"]) for shard in recorded.index["shards"])
        processes = run.state.num_processes
        needed = min(steps_of(stage, processes) * rows_of_a_step(stage) * processes, recorded.index["data_rows"])
        if have < needed:
            raise RecipeError(
                key,
                f"{have:,} rows are recorded, training needs {needed:,}; run transmla record again, with more tokens "
                "where one step of all processes is longer than the budget",
            )
