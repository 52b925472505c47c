"""Free disk for what is to be made again: an artifact stands until its replacement is whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transmla.hardware import require_disk
from transmla.plan.disk import Made, bytes_by_artifact, peak_of
from transmla.run.artifacts import current
from transmla.run.context import Run
from transmla.run.lineage import students_to_make


def check_room(run: Run) -> None:
    """Refuse a run whose new artifacts do not fit beside those that they replace.

    Raises:
        RecipeError: they do not.
    """
    require_disk(run.paths.root, peak_of(_to_make(run)))


def _to_make(run: Run) -> Iterator[Made]:
    """What is to be made, in this order."""
    sizes, paths, digests = run.prepared.sizes, run.paths, run.digests
    needed = bytes_by_artifact(run.recipe, sizes, run.prepared.config, run.dtype)
    for index in sorted(students_to_make(run)):
        checkpoints = max(0, needed.checkpoints[index] - _size(paths.checkpoints(index))) if index >= 0 else 0
        yield Made(needed.model, old=_size(paths.stage(index)), beside=checkpoints)
    if not current(run, paths.exported, digests.export):
        yield Made(needed.exported, old=_size(paths.exported))
    teacher = paths.evaluation("teacher")
    if not current(run, teacher, digests.evaluation("teacher")):
        yield Made(needed.states, old=_size(teacher))


def _size(folder: Path) -> int:
    files = folder.rglob("*") if folder.is_dir() else ()
    return sum(file.stat().st_size for file in files if file.is_file())
