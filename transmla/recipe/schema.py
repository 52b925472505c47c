"""The typed schema of a recipe. Unknown keys are refused, and nothing here loads a model or a dataset.

`transmla.recipe.compose.load_recipe` builds a `Recipe` from YAML and overrides; every part of the program
receives its own section of it, never the whole.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from transmla.recipe.base import Section
from transmla.recipe.bounds import Batch, Dimension, Factor, Number, Seed, Share, Tokens, Whole, Window
from transmla.recipe.data_lists import DataList
from transmla.recipe.evaluation import Evaluate
from transmla.recipe.folder_name import FolderName, PathText
from transmla.recipe.model_source import ModelSource
from transmla.recipe.stages import AnyStage
from transmla.recipe.writing import AnyWriting


class Calibration(Section):
    """Text that the second moments are measured on."""

    data: DataList
    tokens: Tokens = 131_072
    max_length: Window = 1024
    batch_size: Batch = 8
    sample: Literal["first", "random"] = "first"  # which windows of the text; random: by the recipe's seed


# What a method means for the keys that a recipe leaves out; naming one of them is a variant of the method.
METHODS: dict[str, dict[str, Any]] = {
    "default": {"mixing": "complex", "mean_rotation": True, "weighting": "attention", "refit": True},
    "transmla": {"mixing": "real", "mean_rotation": False, "weighting": "norm", "refit": False},
}


class Convert(Section):
    """Dimensions and method of the conversion (docs/conversion.md).

    `auto` is chosen on a part of the calibration text that the moments were not measured on: first mean rotation, then
    dimensions and collapse, then freqfold by layer (one for all with `method: transmla`, as published).
    `cached_values` is what rope head and latent have together where one of them is `auto`.
    """

    method: Literal["default", "transmla"] = "default"
    qk_rope_head_dim: Dimension | Literal["auto"] = 64
    kv_lora_rank: Dimension | Literal["auto"] = 512
    cached_values: Dimension | None = None
    q_lora_rank: Dimension | None = None
    freqfold: Dimension | Literal["auto"] = "auto"
    collapse: Dimension | Literal["auto", "natural"] = "natural"  # natural: head dimension / qk_rope_head_dim
    mixing: Literal["complex", "real"] = "complex"  # matrices that mix key heads of one frequency
    mean_rotation: bool | Literal["auto"] = True  # a lost rotation becomes its mean's phase under attention's distances
    weighting: Literal["attention", "input", "norm"] = "attention"  # what errors of keys and values are weighed by
    kv_balance: Factor = 1.0  # factor on the keys' share of the latent
    refit: bool = True  # output projections by regression onto the source's attention, layer after layer
    drift: Share = 0.3  # share of the stream's drift that a refit corrects
    # fold: queries, keys and values without a bias, for engines that have none; a linear feature of the input stands in
    biases: Literal["keep", "fold"] = "keep"
    latent_heads: Dimension = 1  # latents that kv_lora_rank is cut into, each for its share of the heads (GLA)
    tied: bool = False  # a head's value is its latent, its key without rotation the latent's first half (GTA)
    rope: Literal["keep", "stock"] = "keep"  # stock: a scaled embedding becomes the nearest that every engine knows
    # stock: a router's softmax in the form of DeepSeek's sigmoid, so that experts are exported as a stock checkpoint
    router: Literal["keep", "stock"] = "keep"
    latent_norm: bool = False  # a real RMSNorm on the latents, as DeepSeek has, in place of none
    streaming: bool | Literal["auto"] = "auto"  # read the source layer by layer; auto: where both models do not fit
    calibration: Calibration

    @model_validator(mode="before")
    @classmethod
    def _from_method(cls, tree: Any) -> Any:
        method = tree.get("method", "default") if isinstance(tree, dict) else None
        return METHODS.get(method, {}) | tree if isinstance(method, str) else tree

    @model_validator(mode="after")
    def _budget(self) -> Convert:
        free = [name for name in ("qk_rope_head_dim", "kv_lora_rank") if getattr(self, name) == "auto"]
        if free and self.cached_values is None:
            raise ValueError(f"{free[0]} is auto: give cached_values, what rope head and latent have together")
        rope, latent = self.qk_rope_head_dim, self.kv_lora_rank
        if rope != "auto" and latent != "auto" and self.cached_values not in (None, rope + latent):
            raise ValueError(
                f"cached_values {self.cached_values} is not qk_rope_head_dim + kv_lora_rank; leave it out, or one "
                f"of them auto"
            )
        return self

    @property
    def searched(self) -> bool:
        """Whether something is left for the calibration text to choose."""
        return "auto" in (self.qk_rope_head_dim, self.kv_lora_rank, self.freqfold, self.collapse, self.mean_rotation)


def _shard_size(text: str) -> str:
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:KB|MB|GB|TB)", text, re.IGNORECASE)
    if number is None or float(number[1]) <= 0:
        raise ValueError("a size is a number above 0 with KB, MB, GB or TB behind it, as 5GB")
    return text


ShardSize = Annotated[str, AfterValidator(_shard_size)]


class Verify(Section):
    """The reload check of an export: stock transformers against the recovered student."""

    # max |difference of log-probabilities|; None: from the dtype
    tolerance: Annotated[Number, Field(ge=1e-12, le=10.0)] | None = None
    tokens: Annotated[Whole, Field(gt=0, le=2**20)] = 256


ENGINES = ("transformers", "vllm", "vllm-transformers", "sglang", "llama.cpp")


def _engines(value: Any) -> Any:
    if value == "auto":
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or any(name not in ENGINES for name in names):
        raise ValueError(f"auto, or a list of engines that must read the checkpoint: {', '.join(ENGINES)}")
    return list(dict.fromkeys(names))


class Export(Section):
    """The final checkpoint."""

    # auto: a stock DeepSeek-V3 checkpoint where that can express the model, else the student's own class
    format: Literal["auto", "deepseek_v3", "student"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the recovered student is stored
    layout: Literal["compact", "padded"] = "compact"  # padded: 128/64/128/512 for the engines' fast kernels
    # that must read the checkpoint rightly, or it is refused; auto: none must, and the plan says which do
    engines: Annotated[Literal["auto"] | list[str], BeforeValidator(_engines)] = "auto"
    max_shard_size: ShardSize = "5GB"
    verify: Verify = Verify()

    def content(self) -> dict[str, Any]:
        """What decides the files: all but the engines, which only refuse."""
        return self.model_dump(mode="json", exclude={"engines"})


MOST = 100  # stages, and texts to write


class Recipe(Section):
    """A whole run: source, conversion, recovery stages, evaluation, export."""

    name: FolderName
    seed: Seed = 0
    output_dir: PathText = "outputs/{name}"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # auto: bfloat16 where the hardware multiplies it fast
    )
    deterministic: bool = False  # the same bits from every run on a GPU, unbroken or resumed; slower
    # CPU threads per process; auto: the machine's cores, shared out
    threads: Annotated[Whole, Field(gt=0, le=1024)] | Literal["auto"] = "auto"
    dry_run: bool = False
    # of one device in training, for the hours of a plan; None: what `transmla bench` measured
    tokens_per_second: Annotated[Number, Field(gt=0.0, le=1e9)] | None = None
    model: ModelSource
    write: Annotated[
        list[AnyWriting], Field(max_length=MOST)
    ] = []  # text that the teacher writes before anything else, `@NAME` in a list of data
    convert: Convert
    recover: Annotated[list[AnyStage], Field(max_length=MOST)] = []
    evaluate: Evaluate
    export: Export = Export()
    # Values that stand as an interpolation in the file, as they stand there, by their place in the tree.
    _interpolations: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)
