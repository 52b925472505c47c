"""The rows of the engine table in docs/serving.md: recipes whose exports have what engines differ in."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.source_folder import make_leaning_mixtral
from transmla.recipe.compose import load_recipe
from transmla.recipe.schema import Recipe

CONVERTED = ("device=cpu", "recover=[]", "export.dtype=float32")  # an export, and no training
TINY = ("convert.qk_rope_head_dim=16",)  # 16 + 16: vLLM's attention on a CPU takes no head of 24
LLAMA3 = (
    "{rope_type: llama3, rope_theta: 1e4, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, "
    "original_max_position_embeddings: 64}"
)


@dataclass(frozen=True)
class Row:
    """recipe, words: what is exported. weights: the environment variable that names a directory with the source's real
    weights; None: they are random. made: writes a source of these facts into a directory, where a recipe's random one
    lacks what trained models have."""

    recipe: str
    words: tuple[str, ...]
    weights: str | None = None
    made: Callable[[Path], Path] | None = None

    @property
    def missing(self) -> str | None:
        """Why the row cannot be exported here."""
        if self.weights is not None and not Path(os.environ.get(self.weights, "")).joinpath("config.json").is_file():
            return f"{self.weights} names a directory with the model"
        return None

    def planned(self, *words: str) -> Recipe:
        """The recipe as far as a plan needs it: without the weights."""
        return load_recipe(self.recipe, [*CONVERTED, *self.words, *words])

    def commanded(self, folder: Path) -> list[str]:
        """The words of a command that exports it."""
        source: list[str] = []
        if self.made is not None:
            directory = folder.with_name(f"{folder.name}_source")
            if not directory.is_dir():
                self.made(directory)
            source = [f"model.source={directory}", "~model.config"]
        elif self.weights is not None:
            source = [f"model.source={os.environ[self.weights]}", *FROM_A_DIRECTORY[self.recipe]]
        return [f"recipe={self.recipe}", *CONVERTED, *self.words, *source, f"output_dir={folder}"]


# What recipes say of the packages of the index that their sources come from.
FROM_A_DIRECTORY = {
    "smollm2_135m": ("~model.sha256", "~model.tokenizer"),
    "qwen0.5b_r1": ("~model.sha256", "~model.file", "~model.tie_word_embeddings"),
}
QWEN = (
    "dtype=float32",
    "write=[]",
    "convert.calibration.data=[sample_train]",
    "convert.calibration.tokens=2048",
    "convert.calibration.max_length=512",
    "convert.calibration.batch_size=4",
    "evaluate.solve=[]",
    "evaluate.require=[]",
)
MIXTRAL = (
    *TINY,
    "model.config.model_type=mixtral",
    "+model.config.num_local_experts=4",
    "+model.config.num_experts_per_tok=2",
)


def leaning_mixtral(folder: Path) -> Path:
    """A source of the facts of `MIXTRAL`, whose routers' inputs have a direction in common."""
    return make_leaning_mixtral(folder, initializer_range=0.15)


ROWS = {
    "SmolLM2-135M, compact": Row("smollm2_135m", (), "TRANSMLA_SMOLLM2"),
    "SmolLM2-135M, padded": Row("smollm2_135m", ("export.layout=padded",), "TRANSMLA_SMOLLM2"),
    "Qwen2.5-Coder-0.5B": Row("qwen0.5b_r1", (*QWEN, "convert.biases=keep"), "TRANSMLA_QWEN05"),
    "Qwen2.5-Coder-0.5B, biases folded": Row("qwen0.5b_r1", (*QWEN, "convert.biases=fold"), "TRANSMLA_QWEN05"),
    "llama3 rope, tiny": Row("debug", (*TINY, f"model.config.rope_parameters={LLAMA3}")),
    "llama3 rope as stock, tiny": Row("debug", (*TINY, f"model.config.rope_parameters={LLAMA3}", "convert.rope=stock")),
    "Mixtral, tiny": Row("debug", MIXTRAL),
    "Mixtral as stock, tiny": Row("debug", (*MIXTRAL, "convert.router=stock"), made=leaning_mixtral),
    "Qwen3, tiny": Row("debug", (*TINY, "model.config.model_type=qwen3")),
    "Gemma 2, tiny": Row(
        "debug",
        (
            *TINY,
            "model.config.model_type=gemma2",
            "+model.config.sliding_window=16",
            "+model.config.attn_logit_softcapping=2.0",
            "+model.config.query_pre_attn_scalar=16",
        ),
    ),
}
