"""The part of a pipeline that knows whom each stage's loss asks, and refuses what could not answer."""

from __future__ import annotations

import gc
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from transmla.errors import RecipeError
from transmla.fingerprints import Fingerprints
from transmla.maker import Maker
from transmla.preflight_write import kind_of_data
from transmla.recipe_stages import AnyStage
from transmla.recordings import is_recorded
from transmla.sources import fetch, load_model


def is_other(stage: AnyStage) -> bool:
    """Whether a stage's teacher is a model of its own."""
    return stage.kind == "distill" and not isinstance(stage.teacher, str)


class Teachers(Maker):
    """Teachers of recovery stages; a pipeline sets the attributes."""

    digests: Fingerprints
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    device: str

    def stage_folder(self, index: int) -> Path:
        """Where the result of recovery stage `index` is."""
        raise NotImplementedError

    def _teacher_of(self, stage: AnyStage) -> PreTrainedModel | None:
        """The model that a stage's loss asks, or None."""
        if stage.kind == "sft" or is_recorded(stage) or is_other(stage):
            self.__dict__.pop("teacher", None)  # the source makes room
            gc.collect()
        if stage.kind == "sft" or is_recorded(stage):
            return None
        if is_other(stage):
            return load_model(fetch(stage.teacher), self.prepared.dtype, self.device)
        return self.teacher

    def check_templates(self) -> None:
        """Refuse, before any weight is loaded, conversations that the tokenizer has no template for."""
        used = [("convert.calibration.data", self.recipe.convert.calibration.data), ("evaluate.data", self.recipe.evaluate.data)]
        used += [(f"recover.{index}.data", stage.data) for index, stage in enumerate(self.recipe.recover)]
        for key, data in used:
            if self.tokenizer.chat_template is None and kind_of_data(data, key, self.recipe) == "messages":
                raise RecipeError(key, "it is of conversations, and the tokenizer has no chat template; use text")

    def check_teachers(self) -> None:
        """Refuse, before any weight is loaded, a teacher that reads other tokens than the source."""
        for index, stage in enumerate(self.recipe.recover):
            if is_other(stage) and not self._is_current(self.stage_folder(index), self.digests.stage(index)):
                other = AutoTokenizer.from_pretrained(fetch(stage.teacher))
                if other.get_vocab() != self.tokenizer.get_vocab():
                    raise RecipeError(
                        f"recover.{index}.teacher",
                        f"{stage.teacher.source} has another tokenizer than the source; name one that shares it",
                    )
