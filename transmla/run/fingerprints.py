"""Fingerprints: digests of the settings and inputs that an artifact is made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from transmla.data.definition import DataDefinition, find_definition, local_files
from transmla.data.reading import format_of
from transmla.measure.tasks import digests
from transmla.plan.checks import Prepared
from transmla.recipe.data_lists import Part, data_names
from transmla.recipe.model_source import ModelSource
from transmla.recipe.stages import AnyStage
from transmla.recipe.writing import Solve, Traces, is_synthetic
from transmla.sources.file_digests import known_digests
from transmla.sources.hub_commits import commit_of
from transmla.sources.identity import identity


def fingerprint(content: Any) -> str:
    """Digest of settings and inputs: equal content, equal digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


FORMAT = 3  # raise it when the same settings would give another result than before

# Keys of a trainer that change what is written or shown, not what is learned.
COSMETIC = (
    "logging_steps",
    "save_steps",
    "save_strategy",
    "enable_jit_checkpoint",
    "save_total_limit",
    "report_to",
    "disable_tqdm",
    "dataset_num_proc",
    "dataloader_num_workers",
    "dataloader_pin_memory",
)

# Keys that came later, with what they are where nobody names them: what was made before is still good.
LATER = (
    ("latent_heads", 1),
    ("tied", False),
    ("biases", "keep"),
    ("folded_biases", False),
    ("rope", "keep"),
    ("stock_rope", None),
    ("router", "keep"),
    ("stock_router", False),
)
LATER_OF_A_STAGE = (
    ("logits", 0.0),
    ("relative_learning_rate", False),
    ("synthetic_cross_entropy", False),
    ("muon_learning_rate", None),
)

COSTS = ("keep_teacher",)  # keys of a stage that change what it costs, not what comes of it

# Keys of a trainer that decide which tokens make which row.
PREPARATION = (
    "packing",
    "packing_strategy",
    "max_length",
    "shuffle_dataset",
    "padding_free",
    "pad_to_multiple_of",
    "completion_only_loss",
    "assistant_only_loss",
    "chat_template_path",
    "eos_token",
    "pad_token",
    "dataset_kwargs",
)


def _known(settings: dict[str, Any], later: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Settings without keys that came later and have the value of before."""
    return {key: value for key, value in settings.items() if (key, value) not in later}


def _rows(stage: AnyStage) -> dict[str, int]:
    """Marks the stages whose rows or batches are others than they once were: short rows joined, an epoch's rest left
    out."""
    changed = stage.trainer.get("packing_strategy") == "wrapped" or getattr(stage, "compile", False) is True
    return {"rows": 2} if changed else {}


# What may change of an entry of `write` without another sample being drawn, and what is looked at as content.
NOT_SAMPLED = {"keep", "format", "tokens", "engine", "prefix_data", "problems"}


def _shares(data: Sequence[str | Part]) -> list[Any]:
    """Filters and weights of a `data` list, without names."""
    return [None if isinstance(part, str) else part.model_dump(mode="json", exclude={"name"}) for part in data]


def _content(definition: DataDefinition, folder: Path, key: str) -> list[Any]:
    """A dataset's definition, and digests of its files or the commit of its hub repository."""
    settings = definition.model_dump(mode="json", exclude={"about", "licence", "path", "local"})
    if definition.hub is not None:
        return [settings, commit_of(definition.hub, definition.revision, "dataset")]
    files = local_files(definition, folder, key)
    return [settings, list(zip(map(format_of, files), known_digests(files), strict=True))]


def _template(trainer: dict[str, Any]) -> dict[str, Any]:
    """The content of a trainer's chat template where it is a file, instead of its place."""
    file = Path(str(trainer.get("chat_template_path")))
    return {"chat_template_path": known_digests([file])} if file.is_file() else {}


class Fingerprints:
    """Digests of settings and inputs, each stage's containing the one before.

    The number of processes is no input: a student that eight processes trained is exported by one.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.recipe = prepared.recipe

        self._contents: dict[str, list[Any]] = {}  # of datasets by name: a run looks at its inputs once

    def _order(self) -> dict[str, bool]:
        """What was made with sums in any order is no result of a recipe that wants them in one."""
        return {"deterministic": True} if self.recipe.deterministic else {}

    def _data(self, data: Sequence[str | Part], key: str) -> list[Any]:
        """What the datasets hold and how they are read, whatever they are called and wherever they lie."""
        found: list[Any] = []
        for name in data_names(data):
            if name.startswith("@"):
                found.append(self.written(name.removeprefix("@")))
                continue
            if name not in self._contents:
                self._contents[name] = _content(*find_definition(name, key), key)
            found.append(self._contents[name])
        return found

    def _problems(self, entry: Traces | Solve, key: str) -> list[Any]:
        """Which problems an entry means."""
        data = [] if entry.problems.data is None else self._data([entry.problems.data], f"{key}.problems.data")
        return [entry.problems.model_dump(mode="json", exclude={"data"}), entry.skip, entry.limit, data]

    def _exams(self) -> list[Any]:
        exams = self.recipe.evaluate.solve
        return [self._problems(entry, f"evaluate.solve.{index}") for index, entry in enumerate(exams)]

    def samples(self, name: str) -> str:
        """Of the samples of an entry of `write`, before any is left out."""
        index, entry = next(item for item in enumerate(self.recipe.write) if item[1].name == name)
        if isinstance(entry, Traces):
            data = self._problems(entry, f"write.{index}")
        else:
            data = self._data(entry.prefix_data, f"write.{index}.prefix_data")
        return fingerprint(
            {
                "source": identity(self.recipe.model),
                "settings": entry.model_dump(mode="json", exclude=NOT_SAMPLED),
                "data": data,
                "dtype": str(self.prepared.dtype),
                "seed": self.recipe.seed,
                "draws": 2,  # a seed once meant another text
            }
            | self._order()
        )

    def written(self, name: str) -> str:
        """Of an entry of `write`. Problems that are evaluated on are left out of it, so they are an input."""
        entry = next(entry for entry in self.recipe.write if entry.name == name)
        heldout = self._exams() if isinstance(entry, Traces) else []
        settings = entry.model_dump(mode="json", include={"keep", "format", "tokens", "engine"})
        if is_synthetic(entry):
            settings["synthetic"] = True  # what was written before says nothing of it
        return fingerprint({"input": self.samples(name), "settings": settings, "heldout": heldout})

    def replies(self, model: str, name: str) -> str:
        """Of a model's replies to the problems of an entry of `evaluate.solve`."""
        index, entry = next(item for item in enumerate(self.recipe.evaluate.solve) if item[1].name == name)
        return fingerprint(
            {
                "input": self._model(model),
                "settings": entry.model_dump(mode="json", exclude={"problems"}),
                "data": self._problems(entry, f"evaluate.solve.{index}"),
                "dtype": str(self.prepared.dtype),
                "seed": self.recipe.seed,
            }
            | self._order()
        )

    @cached_property
    def convert(self) -> str:
        """Of the conversion."""
        section = self.recipe.convert
        settings = section.model_dump(mode="json", exclude={"calibration": {"data"}, "streaming": True})
        return fingerprint(
            {
                "format": FORMAT,
                "source": identity(self.recipe.model),
                "geometry": _known(asdict(self.prepared.geometry), LATER),
                "convert": _known(settings, LATER),
                "parts": _shares(section.calibration.data),
                "data": self._data(section.calibration.data, "convert.calibration.data"),
                "dtype": str(self.prepared.dtype),
                "seed": self.recipe.seed,
            }
            | self._order()
        )

    def stage(self, index: int) -> str:
        """Of recovery stage `index`; -1 is the conversion."""
        if index < 0:
            return self.convert
        stage = self.recipe.recover[index]
        settings = stage.model_dump(mode="json", exclude={"data"})
        settings["trainer"] |= _template(settings["trainer"])
        if settings.get("compile") == "auto":
            settings["compile"] = False  # what it was where nobody named it
        for key in COSMETIC:
            settings["trainer"].pop(key, None)
        settings = {key: value for key, value in _known(settings, LATER_OF_A_STAGE).items() if key not in COSTS}
        settings |= _rows(stage)
        if stage.kind == "distill":
            settings["record"].pop("folder")
            if isinstance(stage.teacher, ModelSource):
                settings["teacher"] = identity(stage.teacher)  # its files, not only where they are
        return fingerprint(
            {
                "input": self.stage(index - 1),
                "stage": settings,
                "parts": _shares(stage.data),
                "data": self._data(stage.data, f"recover.{index}.data"),
            }
        )

    def recording(self, index: int) -> str:
        """Of what stage `index` has recorded of its teacher, as far as can be told without tokenising."""
        stage = self.recipe.recover[index]
        assert stage.kind == "distill", "no other stage has a recording"
        return fingerprint(
            {
                "source": identity(self.recipe.model),
                "dtype": str(self.prepared.dtype),
                "seed": self.recipe.seed,
                "data": self._data(stage.data, f"recover.{index}.data"),
                "parts": _shares(stage.data),
                "packing": {key: stage.trainer[key] for key in PREPARATION if key in stage.trainer}
                | _template(stage.trainer),
                "record": stage.record.model_dump(mode="json", exclude={"folder"}),
            }
            | _rows(stage)
            | self._order()
        )

    @property
    def student(self) -> str:
        """Of the newest student."""
        return self.stage(len(self.recipe.recover) - 1)

    @property
    def export(self) -> str:
        """Of the exported checkpoint."""
        return fingerprint(
            {
                "input": self.student,
                "export": self.recipe.export.content(),
                "format": self.prepared.export.name,
            }
        )

    def _model(self, name: str) -> str:
        inputs = {"converted": lambda: self.convert, "recovered": lambda: self.student, "exported": lambda: self.export}
        return fingerprint(identity(self.recipe.model)) if name == "teacher" else inputs[name]()

    def evaluation(self, model: str) -> str:
        """Of the evaluation of `teacher`, `converted`, `recovered` or `exported`."""
        section = self.recipe.evaluate
        left_out = section.generated if self.prepared.evaluation.on else []
        return fingerprint(
            {
                "input": self._model(model),
                "evaluate": section.model_dump(mode="json", exclude={"require", "streaming"}),
                "tasks": digests(section),
                "data": self._data(section.data, "evaluate.data"),
                "dtype": str(self.prepared.dtype),
            }
            | ({"solve": [self._exams(), self.recipe.seed]} if section.solve else {})
            | ({"left_out": left_out} if left_out else {})
        )
