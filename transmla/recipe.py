"""The typed schema of a recipe. Unknown keys are refused, and nothing here loads a model or a dataset.

`transmla.compose.load_recipe` builds a `Recipe` from YAML and overrides; every part of the program
receives its own section of it, never the whole.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from transmla.entries import DataList, Part
from transmla.errors import RecipeError
from transmla.evaluate.settings import Requirement, TaskSource, check_names
from transmla.recipe_model import ModelSource
from transmla.recipe_stages import STAGES, AnyStage
from transmla.recipe_write import WRITINGS, AnyWriting, Solve
from transmla.section import Section
from transmla.trainer_keys import suggest


class Calibration(Section):
    """Text that the second moments are measured on."""

    data: DataList
    tokens: PositiveInt = 131_072
    max_length: PositiveInt = 1024
    batch_size: PositiveInt = 8
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
    qk_rope_head_dim: PositiveInt | Literal["auto"] = 64
    kv_lora_rank: PositiveInt | Literal["auto"] = 512
    cached_values: PositiveInt | None = None
    q_lora_rank: PositiveInt | None = None
    freqfold: PositiveInt | Literal["auto"] = "auto"
    collapse: PositiveInt | Literal["auto", "natural"] = "natural"  # natural: head dimension / qk_rope_head_dim
    mixing: Literal["complex", "real"] = "complex"  # matrices that mix key heads of one frequency
    mean_rotation: bool | Literal["auto"] = True  # a lost rotation becomes its mean's phase under attention's distances
    weighting: Literal["attention", "input", "norm"] = "attention"  # what errors of keys and values are weighed by
    kv_balance: PositiveFloat = 1.0  # factor on the keys' share of the latent
    refit: bool = True  # output projections by regression onto the source's attention, layer after layer
    drift: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3  # share of the stream's drift that a refit corrects
    latent_norm: bool = False  # a real RMSNorm on the latents, as DeepSeek has, in place of none
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
        if not free and self.cached_values not in (None, self.qk_rope_head_dim + self.kv_lora_rank):
            raise ValueError(
                f"cached_values {self.cached_values} is not qk_rope_head_dim + kv_lora_rank; leave it out, or one of them auto"
            )
        return self

    @property
    def searched(self) -> bool:
        """Whether something is left for the calibration text to choose."""
        return "auto" in (self.qk_rope_head_dim, self.kv_lora_rank, self.freqfold, self.collapse, self.mean_rotation)


# What a discriminator writes into an error's location.
TAGS: dict[str, Any] = STAGES | WRITINGS | {"part": Part, "dataset name": str}


class Evaluate(Section):
    """Quality of teacher, converted, recovered and exported model on the same windows and the same questions."""

    data: list[str]
    tasks: Annotated[list[TaskSource], AfterValidator(check_names)] = []
    require: list[Requirement] = []
    tokens: PositiveInt = 90_112  # a dataset
    max_length: PositiveInt = 2048
    batch_size: PositiveInt = 1
    prompts: list[str] = []  # text the exported model continues, greedily, for the report
    max_new_tokens: PositiveInt = 48
    repetition_penalty: PositiveFloat = 1.2  # small models go round in circles under greedy decoding
    solve: list[Solve] = []  # problems whose answers are checked


class Verify(Section):
    """The reload check of an export: stock transformers against the recovered student."""

    tolerance: PositiveFloat | None = None  # max |difference of log-probabilities|; None: from the dtype
    tokens: PositiveInt = 256


class Export(Section):
    """The final checkpoint."""

    # auto: a stock DeepSeek-V3 checkpoint where that can express the model, else the student's own class
    format: Literal["auto", "deepseek_v3", "student"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the recovered student is stored
    layout: Literal["compact", "padded"] = "compact"  # padded: 128/64/128/512 for the engines' fast kernels
    max_shard_size: str = "5GB"
    verify: Verify = Verify()


class Recipe(Section):
    """A whole run: source, conversion, recovery stages, evaluation, export."""

    name: str
    seed: NonNegativeInt = 0
    output_dir: str = "outputs/{name}"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where the hardware multiplies it fast
    threads: PositiveInt | Literal["auto"] = "auto"  # CPU threads a process; auto: the machine's cores, shared out
    dry_run: bool = False
    model: ModelSource
    write: list[AnyWriting] = []  # text that the teacher writes before anything else, `@NAME` in a list of data
    convert: Convert
    recover: list[AnyStage] = []
    evaluate: Evaluate
    export: Export = Export()


def validate_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a plain tree of values.

    Raises:
        RecipeError: for the first wrong key, with its dotted name and what would be right.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key, section = _dotted(first["loc"])
        if first["type"] == "extra_forbidden":
            leaf = key.rsplit(".", 1)[-1]
            raise RecipeError(key, f"unknown key{suggest(leaf, section)}; remove it or correct its name") from None
        if first["type"] == "missing":
            raise RecipeError(key, "required key is missing; add it to the recipe") from None
        if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
            kinds = WRITINGS if key.startswith("write") else STAGES
            raise RecipeError(f"{key}.kind", f"unknown kind of stage; use one of: {', '.join(kinds)}") from None
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        raise RecipeError(key, message + got) from None


def _dotted(location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The dotted key of a pydantic location and the known keys of its section."""
    parts: list[str] = []
    model: Any = Recipe
    for index, part in enumerate(location):
        if parts and parts[-1].isdigit() and part in TAGS:  # the discriminator's tag is no key
            model = TAGS[str(part)]
            continue
        if part in ("int", "bool", "constrained-int", "ModelSource") or str(part).startswith("literal["):  # branches of a union of types are no keys
            continue
        if index + 1 < len(location) and isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            model = field.annotation if field is not None else None
        parts.append(str(part))
    known = list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
    return ".".join(parts), known
