"""What of a recipe's chain is still to be made, walked back from its newest result; and where its results lie."""

from __future__ import annotations

import os
import re

from transmla.files import remove, remove_abandoned
from transmla.recipe.data_lists import data_names
from transmla.run.artifacts import agreed, condition, is_current, read_metadata
from transmla.run.context import Run


def students_to_make(run: Run) -> set[int]:
    """Recovery stages to train, and -1 for the conversion.

    They are those from the newest student that is current to the recipe's last; what was deleted before it is not
    missed. What is there and damaged is made again wherever it stands.
    """

    def walk() -> set[int]:
        wanted: set[int] = set()
        last = len(run.recipe.recover) - 1
        for index in range(last, -2, -1):
            found = condition(run.paths.stage(index), run.digests.stage(index))
            needed = index == last or index + 1 in wanted
            if found.damage is not None or (needed and not found.current):
                wanted.add(index)
        return wanted

    return agreed(run, walk)


def texts_to_make(run: Run) -> set[str]:
    """Entries of `write` that are damaged, or that are missing and read by what is to be made.

    One that nothing in the recipe reads is an end in itself.
    """
    recipe, students = run.recipe, students_to_make(run)

    def walk() -> set[str]:
        wanted: set[str] = set()
        for entry in reversed(recipe.write):  # an entry reads entries before it
            readers = [(data_names(recipe.convert.calibration.data), -1 in students), (recipe.evaluate.data, True)]
            readers += [(data_names(stage.data), index in students) for index, stage in enumerate(recipe.recover)]
            readers += [(other.prefix_data, other.name in wanted) for other in recipe.write if other.kind == "text"]
            needed = [made for names, made in readers if f"@{entry.name}" in names] or [True]
            found = condition(run.paths.written(entry.name), run.digests.written(entry.name))
            if found.damage is not None or (any(needed) and not found.current):
                wanted.add(entry.name)
        return wanted

    return agreed(run, walk)


def arrange(run: Run) -> None:
    """Clear what killed runs have left, and put the results that are there where this recipe looks for them."""
    if run.state.is_main_process:
        for folder in run.paths.places:
            remove_abandoned(folder)
        if run.recipe.recover:
            _keep_other_result(run)
            _find_own_result(run)
    run.state.wait_for_everyone()


def _keep_other_result(run: Run) -> None:
    """A recipe that was lengthened or shortened: what was `recovered` is another stage's, and still good."""
    paths, last = run.paths, len(run.recipe.recover) - 1
    metadata = read_metadata(paths.recovered) or {}
    label = re.fullmatch(r"recover\.(\d+) (\w+)", str(metadata.get("name")))
    if label is None:
        return
    index, kind = int(label[1]), label[2]
    home = paths.earlier_stage(index, kind)
    if home == paths.earlier_stage(last, run.recipe.recover[last].kind):
        return
    if index < last and is_current(home, run.digests.stage(index)):
        return  # what is to be replaced is a stage's of other settings
    run.say(f"[recover] {paths.recovered} is what recover.{index} {kind} made; it is kept as {home}")
    remove(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    os.replace(paths.recovered, home)


def _find_own_result(run: Run) -> None:
    """The last stage's result, where a longer recipe has kept it among its earlier stages."""
    paths, last = run.paths, len(run.recipe.recover) - 1
    home, digest = paths.earlier_stage(last, run.recipe.recover[last].kind), run.digests.stage(last)
    if is_current(paths.recovered, digest) or not is_current(home, digest):
        return
    run.say(f"[recover] {home} is this recipe's result; it is now {paths.recovered}")
    remove(paths.recovered)
    os.replace(home, paths.recovered)
