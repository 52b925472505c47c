"""Where everything of a run lies below its output directory."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from transmla.recipe.schema import Recipe


@dataclass(frozen=True)
class Paths:
    """Folders of one recipe's artifacts. root: the output directory."""

    root: Path
    recipe: Recipe

    def written(self, name: str) -> Path:
        """Text of an entry of `write`."""
        return self.root / "written" / name

    def samples(self, name: str) -> Path:
        """Samples of an entry of `write`, before any is left out."""
        return self.root / "written" / f"{name}.parts"

    @property
    def converted(self) -> Path:
        """The student before training."""
        return self.root / "converted"

    @property
    def recovered(self) -> Path:
        """The student after the last recovery stage."""
        return self.root / "recovered"

    @property
    def places(self) -> list[Path]:
        """The folders in which artifacts are made."""
        return [self.root, *(self.root / name for name in ("written", "stages", "evaluation"))]

    def earlier_stage(self, index: int, kind: str) -> Path:
        """The student after a recovery stage that is not the last one."""
        return self.root / "stages" / f"{index}_{kind}"

    def stage(self, index: int) -> Path:
        """The student after recovery stage `index`; the last stage's is `recovered`, -1 is the conversion."""
        if index < 0:
            return self.converted
        last = index == len(self.recipe.recover) - 1
        return self.recovered if last else self.earlier_stage(index, self.recipe.recover[index].kind)

    @property
    def student(self) -> Path:
        """The newest student: recovered, or converted where the recipe has no recovery."""
        return self.stage(len(self.recipe.recover) - 1)

    def checkpoints(self, index: int) -> Path:
        """Checkpoints of recovery stage `index`, until it is finished."""
        return self.root / "checkpoints" / f"{index}_{self.recipe.recover[index].kind}"

    def recording(self, index: int) -> Path:
        """What `record` keeps of the teacher for recovery stage `index`."""
        stage = self.recipe.recover[index]
        assert stage.kind == "distill", "no other stage has a recording"
        folder = stage.record.folder
        return self.root / "recorded" / str(index) if folder is None else Path(folder).expanduser()

    @property
    def exported(self) -> Path:
        """The final checkpoint."""
        return self.root / "exported"

    def evaluation(self, model: str) -> Path:
        """The evaluation of `teacher`, `converted`, `recovered` or `exported`."""
        return self.root / "evaluation" / model

    def replies(self, model: str, name: str) -> Path:
        """A model's replies to the problems of an entry of `evaluate.solve`."""
        return self.root / "evaluation" / f"{model}.parts" / name

    @property
    def logs(self) -> Path:
        """TensorBoard's files."""
        return self.root / "logs"


def reference_file(folder: Path, dataset: str) -> Path:
    """Where the teacher's windows, hidden states and head for a dataset are kept: unlike names, unlike files."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", dataset)[-40:].strip("._")
    return folder / f"{readable}-{hashlib.sha256(dataset.encode()).hexdigest()[:16]}.safetensors"
