"""Whether a conversion and an evaluation read models layer by layer, from what either way takes of the memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from transmla.convert.conversion import SOLVED_TOGETHER
from transmla.convert.refit import stream_bytes
from transmla.convert.streaming import needs_whole_models
from transmla.errors import RecipeError
from transmla.families import family_of
from transmla.geometry import head_dimension
from transmla.hardware import free_memory
from transmla.plan.memory import Sizes
from transmla.recipe.schema import Recipe
from transmla.sources.kinds import kind_of
from transmla.sources.weight_shards import SHARD

FILL = 0.9  # of what is free; the rest is for fragments of the allocator and other programs
GENERATED = ("accuracy_drop", "solve_recovered")  # measures of what a model writes or chooses
SOLVING = 20  # matrices [D, D] in float64 beside a layer's moments while it is solved
PROGRAM = 3 * 2**30  # bytes of libraries and of CUDA's context in the host's memory


@dataclass(frozen=True)
class Needs:
    """Bytes that a conversion takes at its fullest, roughly. device: of a GPU, 0 without one. host: of the machine."""

    device: int
    host: int

    def describe(self) -> str:
        """Both, for a plan."""
        parts = {"of the GPU": self.device, "of the host": self.host}
        return " and ".join(f"{size / 2**30:.1f} GiB {where}" for where, size in parts.items() if size)


@dataclass(frozen=True)
class Streaming:
    """The choice for one recipe on this machine. reason: of the choice, in words. needs: of the conversion as chosen.
    refusal: key and problem where it should be streamed and cannot be."""

    on: bool
    reason: str
    needs: Needs
    refusal: tuple[str, str] | None = None

    def require(self) -> None:
        """Refuse a conversion that can be neither held whole nor streamed.

        Raises:
            RecipeError: with the ways out.
        """
        if self.refusal is not None:
            raise RecipeError(*self.refusal)


def choose_streaming(
    recipe: Recipe, config: PretrainedConfig, sizes: Sizes, dtype: torch.dtype, device: str
) -> Streaming:
    """Decide how a conversion reads its source.

    `auto` streams where a whole conversion takes more than nine tenths of the GPU's free memory or of the host's.

    Raises:
        RecipeError: `true` was asked for, and the source or something that is `auto` does not allow it.
    """
    wanted, kind = recipe.convert.streaming, kind_of(recipe.model.source)
    whole, streamed = (
        whole_needs(recipe, config, sizes, dtype, device),
        streamed_needs(recipe, config, sizes, dtype, device),
    )
    if wanted is False:
        return Streaming(False, "convert.streaming is false", whole)
    packed = kind in ("gguf", "pypi")
    searched = needs_whole_models(config, recipe.convert)
    if wanted is True:
        if packed:
            raise RecipeError(
                "convert.streaming",
                "a GGUF is read whole before it is converted; use false, or a source in safetensors",
            )
        if searched is not None:
            raise RecipeError(f"convert.{searched}", _searched("convert.streaming is true"))
        return Streaming(True, "convert.streaming is true", streamed)
    short = _too_little(whole, device, "a whole conversion takes")
    if short is None:
        return Streaming(False, f"source and student fit ({whole.describe()})", whole)
    if packed:
        return Streaming(False, f"{short}, but a GGUF cannot be streamed", whole)
    refusal = None if searched is None else (f"convert.{searched}", _searched(short))
    return Streaming(True, short, streamed, refusal)


def choose_streamed_evaluation(
    recipe: Recipe, config: PretrainedConfig, sizes: Sizes, dtype: torch.dtype, device: str
) -> Streaming:
    """Decide how models are evaluated.

    `auto` reads them layer by layer where teacher and student together take more than nine tenths of the GPU's free
    memory, or one of them (both without a GPU) of the host's. A threshold on what is left out then refuses the run.
    """
    heads = 2 * (dtype.itemsize + 4) * config.vocab_size * config.hidden_size  # both, and both in float32
    both, one = dtype.itemsize * (sizes.source + sizes.student), dtype.itemsize * max(sizes.source, sizes.student)
    part = dtype.itemsize * 2 * (max(sizes.source, sizes.student) // config.num_hidden_layers)
    states = stream_bytes(recipe.evaluate.tokens, config.hidden_size, dtype)  # of two models on one dataset
    if device == "cuda":
        whole, streamed = Needs(both + heads, one + PROGRAM), Needs(part + heads, part + states + PROGRAM)
    else:
        whole, streamed = Needs(0, both + heads + PROGRAM), Needs(0, part + heads + states + PROGRAM)
    wanted = recipe.evaluate.streaming
    if wanted is False:
        return Streaming(False, "evaluate.streaming is false", whole)
    short = "evaluate.streaming is true" if wanted is True else _too_little(whole, device, "teacher and student take")
    if short is None:
        return Streaming(False, f"teacher and student fit ({whole.describe()})", whole)
    bound = [index for index, one in enumerate(recipe.evaluate.require) if one.measure in GENERATED]
    refusal = None
    if bound:
        measure = recipe.evaluate.require[bound[0]].measure
        refusal = (
            f"evaluate.require.{bound[0]}.measure",
            f"{measure} is not measured on models that are read layer by layer ({short}); leave it out, or use "
            "evaluate.streaming=false on a machine that holds both models",
        )
    return Streaming(True, short, streamed, refusal)


def _searched(why: str) -> str:
    return (
        f"auto is chosen by comparing whole students, which layers read one at a time do not make ({why}); give a "
        "value, or use convert.streaming=false on a machine that holds both models"
    )


def _too_little(needs: Needs, device: str, what: str) -> str | None:
    """What is too small, in words. what: that takes the memory, with its verb."""
    for where, needed in (("cuda", needs.device), ("cpu", needs.host)):
        if where == "cuda" and device != "cuda":
            continue
        place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if where == "cuda" else where  # no context on another's GPU
        free = free_memory(torch.device(place))
        if needed > FILL * free:
            name = "the GPU's memory" if where == "cuda" else "the host's memory"
            return (
                f"{what} {needed / 2**30:.1f} GiB of {name}, and {free / 2**30:.1f} GiB are free, of "
                f"which {100 * FILL:.0f} % may be used"
            )
    return None


def whole_needs(recipe: Recipe, config: PretrainedConfig, sizes: Sizes, dtype: torch.dtype, device: str) -> Needs:
    """Bytes of a conversion that holds both models.

    Where the layers are computed: the source, the student's attentions, moments of all layers, the solving of those
    that are solved together, a batch. On the host beside a GPU: the source while it is loaded, and as much of the
    student while it is saved.
    """
    together = min(SOLVED_TOGETHER, config.num_hidden_layers) if device == "cuda" else 1
    work = config.num_hidden_layers * _moments(recipe, config) + _working(recipe, config, dtype, together)
    models = dtype.itemsize * (sizes.source + sizes.attention)
    if device == "cuda":
        return Needs(models + work, dtype.itemsize * max(sizes.source, sizes.student) + PROGRAM)
    return Needs(0, models + work + PROGRAM)


def streamed_needs(recipe: Recipe, config: PretrainedConfig, sizes: Sizes, dtype: torch.dtype, device: str) -> Needs:
    """Bytes of a conversion layer by layer.

    Where the layers are computed: one layer with the student's attention beside it or the embedding, whichever is
    larger, this layer's moments, its solving, a batch, and on a GPU the hidden states. On the host: the file of the
    student that is being filled, the part of the source that is being read.
    """
    width, layers = dtype.itemsize, config.num_hidden_layers
    embedding = config.vocab_size * config.hidden_size
    outside = embedding * (1 if config.tie_word_embeddings else 2)
    part = width * max((sizes.source - outside + sizes.attention) // layers, embedding)
    work = _moments(recipe, config) + _working(recipe, config, dtype, 1)
    buffers = min(SHARD, width * sizes.student) + part
    if device == "cuda":
        states = stream_bytes(recipe.convert.calibration.tokens, config.hidden_size, dtype)
        return Needs(part + work + states, buffers + PROGRAM)
    return Needs(0, part + work + buffers + PROGRAM)


def _moments(recipe: Recipe, config: PretrainedConfig) -> int:
    """Bytes of one layer's moments in float64."""
    hidden, heads, width = config.hidden_size, config.num_attention_heads, head_dimension(config)
    count = 3 * hidden**2 + heads * recipe.convert.calibration.max_length
    if family_of(config).head_norms is not None:
        count += heads * width**2 + 2 * (config.num_key_value_heads or heads) * width * hidden
    if recipe.convert.router == "stock":
        count += hidden**2
    return 8 * count


def _working(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, together: int) -> int:
    """Bytes beside weights and moments: layers are solved, so many together, or text passes one."""
    section = recipe.convert.calibration
    batch = section.batch_size * section.max_length * (6 * config.hidden_size + 3 * config.intermediate_size)
    return max(8 * SOLVING * together * config.hidden_size**2, dtype.itemsize * batch)
