"""Data of a run: the lists of a recipe with `@NAME` resolved, as rows to train on or as windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from torch import Tensor

from transmla.data.mixture import load_mixture
from transmla.data.rows import main_first
from transmla.data.windows import named_windows
from transmla.errors import RecipeError
from transmla.recipe.data_lists import Part, data_names
from transmla.run.artifacts import condition, require_unharmed
from transmla.run.context import Run
from transmla.run.rows_ahead import RowsOf

ROWS, DEFINITION = "data.jsonl", "data.yaml"  # of an artifact below `written`


def resolve(run: Run, data: Sequence[str | Part], key: str) -> list[str | Part]:
    """A `data` list with every `@NAME` replaced by the definition of what was written.

    Raises:
        RecipeError: it was not written yet, or under other settings.
    """
    found: list[str | Part] = []
    for entry, name in zip(data, data_names(data), strict=True):
        name = _definition_of(run, name.removeprefix("@"), key) if name.startswith("@") else name
        found.append(name if isinstance(entry, str) else entry.model_copy(update={"name": name}))
    return found


def _definition_of(run: Run, name: str, key: str) -> str:
    folder = run.paths.written(name)
    found = condition(folder, run.digests.written(name))
    if found.damage is not None:
        raise RecipeError(key, f"@{name} is damaged: {found.damage}; run transmla write recipe=... again")
    if not found.current:
        raise RecipeError(key, f"@{name} is not written, or of other settings; run transmla write recipe=... first")
    require_unharmed(folder)
    return str(folder / DEFINITION)


def training_data(run: Run, index: int) -> Dataset:
    """The data of recovery stage `index`."""
    key = f"recover.{index}.data"
    data = resolve(run, run.recipe.recover[index].data, key)
    with main_first():
        return load_mixture(data, key, run.tokenizer, run.recipe.seed, say=run.say)


def rows_of(run: Run, index: int) -> RowsOf | None:
    """What the rows of recovery stage `index` follow from; None: nothing to tokenise ahead, or not written yet."""
    stage, key = run.recipe.recover[index], f"recover.{index}.data"
    names = [name.removeprefix("@") for name in data_names(stage.data) if name.startswith("@")]
    written = all(condition(run.paths.written(name), run.digests.written(name)).current for name in names)
    if stage.kind == "on_policy" or not written:
        return None
    return RowsOf(index, stage, resolve(run, stage.data, key), run.source_folder, run.recipe.seed)


def token_windows_of(
    run: Run, data: Sequence[str | Part], key: str, *, tokens: int, length: int, seed: int | None = None
) -> Tensor:
    """Windows [n, L] of the datasets of a section `key`. seed: of windows at random; None: the first ones."""
    data = resolve(run, data, f"{key}.data")
    return named_windows(
        data, key, run.tokenizer, tokens=tokens, length=length, seed=seed, mixing_seed=run.recipe.seed, say=run.say
    )


def calibration_windows(run: Run) -> Tensor:
    """Windows of calibration text, [n, L]."""
    text = run.recipe.convert.calibration
    seed = run.recipe.seed if text.sample == "random" else None
    return token_windows_of(
        run, text.data, "convert.calibration", tokens=text.tokens, length=text.max_length, seed=seed
    )


def evaluation_windows(run: Run, dataset: str) -> Tensor:
    """Windows of one dataset of `evaluate.data`, [n, L]."""
    section = run.recipe.evaluate
    return token_windows_of(run, [dataset], "evaluate", tokens=section.tokens, length=section.max_length)
