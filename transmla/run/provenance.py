"""What a run was made with and of, so that others can repeat it: command, versions, card, commits of hub sources."""

from __future__ import annotations

import platform
import shlex
import sys
from typing import Any, Literal

import torch

from transmla.data.definition import find_definition
from transmla.errors import masked
from transmla.plan.data_checks import data_lists
from transmla.recipe.data_lists import data_names
from transmla.recipe.model_source import ModelSource
from transmla.recipe.schema import Recipe
from transmla.recipe.stages import other_teacher
from transmla.run.environment import PACKAGES, package_version
from transmla.sources.hub_commits import commit_of
from transmla.sources.kinds import kind_of

Entry = dict[str, str | None]


def provenance(recipe: Recipe, device: str, replaced: list[str] | None = None) -> dict[str, Any]:
    """Plain values for report.json.

    deterministic: None, or what was `replaced` for it, by key. command: as it was typed, without secrets. hub: by
    recipe key, repository, revision and the commit that it is (None where that was never known).
    """
    return {
        "command": " ".join(shlex.quote(masked(word)) for word in sys.argv),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name)) is not None},
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "deterministic": (replaced or []) if recipe.deterministic else None,
        "hub": hub_sources(recipe),
    }


def hub_sources(recipe: Recipe) -> dict[str, Entry]:
    """Every repository of a hub that a recipe reads, by the key that names it first."""
    found: dict[str, Entry] = {}
    models = {"model.source": recipe.model} | {
        f"recover.{index}.teacher": teacher
        for index, stage in enumerate(recipe.recover)
        if isinstance(teacher := other_teacher(stage), ModelSource)
    }
    for key, model in models.items():
        if kind_of(model.source) == "hub":
            found[key] = _entry(model.source, model.revision, "model")
    names = [(key, name) for key, data in data_lists(recipe) for name in data_names(data)]
    for index, entry in enumerate(recipe.write):
        names += [(f"write.{index}", name) for name in data_names(getattr(entry, "prefix_data", []))]
        names += [(f"write.{index}", name) for name in _problems(entry)]
    for index, solve in enumerate(recipe.evaluate.solve):
        names += [(f"evaluate.solve.{index}", name) for name in _problems(solve)]
    for key, name in names:
        if name.startswith("@"):
            continue
        definition, _ = find_definition(name, key)
        if definition.hub is not None:
            found.setdefault(f"{key}: {name}", _entry(definition.hub, definition.revision, "dataset"))
    return found


def _problems(entry: Any) -> list[str]:
    """The dataset of problems that an entry names, if it names one."""
    problems = getattr(entry, "problems", None)
    return [] if problems is None or problems.data is None else [problems.data]


def _entry(repository: str, revision: str | None, kind: Literal["model", "dataset"]) -> Entry:
    return {"repository": repository, "revision": revision, "commit": commit_of(repository, revision, kind)}
