"""What every stage is made from, as digests: equal digests, nothing to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from transmla.artifacts import fingerprint
from transmla.data.definition import find_definition
from transmla.data.sources import local_files
from transmla.entries import Part, data_names
from transmla.preflight import Prepared
from transmla.sources import identity

FORMAT = 2  # raise it when the same settings would give another result than before
# Keys of a trainer that change what is written or shown, not what is learned.
COSMETIC = ("logging_steps", "save_steps", "save_total_limit", "report_to", "disable_tqdm")

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


class Fingerprints:
    """Digests of settings and inputs, each stage's containing the one before.

    The number of processes is no input: a student that eight processes trained is exported by one.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.recipe = prepared.recipe

    def _data(self, data: Sequence[str | Part], key: str) -> list[Any]:
        found = []
        for name in data_names(data):
            definition, folder = find_definition(name, key)
            files = [file.stat() for file in local_files(definition, folder, key)]
            sizes = [[stat.st_size, stat.st_mtime_ns] for stat in files]
            found.append([definition.model_dump(mode="json", exclude={"about", "licence"}), sizes])
        return found

    @cached_property
    def convert(self) -> str:
        """Of the conversion."""
        section = self.recipe.convert
        return fingerprint(
            {
                "format": FORMAT,
                "source": identity(self.recipe.model),
                "geometry": asdict(self.prepared.geometry),
                "convert": section.model_dump(mode="json"),
                "data": self._data(section.calibration.data, "convert.calibration.data"),
                "dtype": str(self.prepared.dtype),
                "seed": self.recipe.seed,
            }
        )

    def stage(self, index: int) -> str:
        """Of recovery stage `index`; -1 is the conversion."""
        if index < 0:
            return self.convert
        stage = self.recipe.recover[index]
        settings = stage.model_dump(mode="json")
        for key in COSMETIC:
            settings["trainer"].pop(key, None)
        return fingerprint(
            {
                "input": self.stage(index - 1),
                "stage": settings,
                "data": self._data(stage.data, f"recover.{index}.data"),
            }
        )

    def recording(self, index: int) -> str:
        """Of what stage `index` has recorded of its teacher, as far as can be told without tokenising."""
        stage = self.recipe.recover[index]
        return fingerprint(
            {
                "source": identity(self.recipe.model),
                "dtype": str(self.prepared.dtype),
                "seed": self.recipe.seed,
                "data": self._data(stage.data, f"recover.{index}.data"),
                "mixture": stage.model_dump(mode="json")["data"],
                "packing": {key: stage.trainer[key] for key in PREPARATION if key in stage.trainer},
                "record": stage.record.model_dump(mode="json", exclude={"folder"}),
            }
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
                "export": self.recipe.export.model_dump(mode="json"),
                "format": self.prepared.export.name,
            }
        )

    def evaluation(self, model: str) -> str:
        """Of the evaluation of `teacher`, `converted`, `recovered` or `exported`."""
        section = self.recipe.evaluate
        inputs = {
            "teacher": fingerprint(identity(self.recipe.model)),
            "converted": self.convert,
            "recovered": self.student,
            "exported": self.export,
        }
        return fingerprint(
            {
                "input": inputs[model],
                "evaluate": section.model_dump(mode="json"),
                "data": self._data(section.data, "evaluate.data"),
                "dtype": str(self.prepared.dtype),
            }
        )
