"""The text that `dry_run=true` prints: what would be made, how large, where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from transmla.geometry import MLAGeometry
from transmla.geometry.rotary import describe_stock_rope
from transmla.plan.data_checks import unseen_files
from transmla.plan.device_memory import describe_parts, misfit, stage_parts
from transmla.plan.disk import bytes_on_disk, cache_bytes, cache_of_text
from transmla.plan.hours import hours_of
from transmla.plan.launched import launch_of_environment
from transmla.plan.memory import Sizes, snapshot_bytes
from transmla.plan.streaming_choice import Streaming
from transmla.recipe.budget import steps_of
from transmla.recipe.schema import Convert, Recipe
from transmla.recipe.stages import AnyStage

if TYPE_CHECKING:
    from transmla.plan.checks import Prepared


def _kept_states(stage: AnyStage, config: PretrainedConfig, dtype: torch.dtype) -> str:
    """What a kept teacher takes besides; how many rows the data has is not known before it is tokenized."""
    if not (stage.kind == "distill" and stage.keep_teacher):
        return ""
    width = config.hidden_size if isinstance(stage.teacher, str) else 0  # another teacher's is not known here
    if not width:
        return ", and the teacher's states of every row of the data"
    row = int(stage.trainer.get("max_length", 1024)) * width * torch.finfo(dtype).bits // 8
    return f", and {row / 2**20:.1f} MiB for every row of the data, for the teacher's states"


def _snapshot(stage: AnyStage, sizes: Sizes) -> str:
    """What the first process takes of the machine's memory for the copy that a checkpoint is written from."""
    if stage.trainer.get("save_strategy") == "no":
        return ""
    return f", {snapshot_bytes(stage, sizes) / 2**30:.1f} GiB of the machine's memory for checkpoints"


def _searched(section: Convert) -> str:
    names = ("qk_rope_head_dim", "kv_lora_rank", "collapse", "freqfold", "mean_rotation")
    free = [name for name in names if getattr(section, name) == "auto"]
    provisional = [name for name in free if name not in ("freqfold", "mean_rotation")]
    shown = f"; the {', '.join(provisional)} of this plan are one of the candidates" if provisional else ""
    return f"a search on held-out calibration text chooses {', '.join(free)}{shown}"


def _latents(geometry: MLAGeometry) -> str:
    """The latents of a student, where there are several or values are tied to them."""
    if geometry.latent_heads == 1 and not geometry.tied:
        return str(geometry.kv_lora_rank)
    heads = geometry.num_attention_heads // geometry.latent_heads
    tied = "; values are the latents, keys their first halves" if geometry.tied else ""
    return f"{geometry.kv_lora_rank} ({geometry.latent_heads} of {geometry.latent_size}, each for {heads} heads{tied})"


def _ranks(geometry: MLAGeometry) -> list[str]:
    """What each rank of tensor parallelism caches."""
    found = []
    for row in geometry.cache_by_ranks[1:]:
        split = f" ({row['split']} where a rank keeps its own latents)" if row["split"] < row["stock"] else ""
        found.append(f"of {row['ranks']} {row['source']} -> {row['stock']}{split}")
    return [f"             on a rank of tensor parallelism: {'; '.join(found)}"] if found else []


def _memory(streaming: Streaming) -> list[str]:
    """How models are read for a stage, what that takes, and why."""
    how = "layer by layer" if streaming.on else "whole models"
    lines = [f"             {how}, about {streaming.needs.describe()}, because {streaming.reason}"]
    if streaming.refusal is not None:
        lines.append(f"             refused on this machine: {streaming.refusal[0]}: {streaming.refusal[1]}")
    return lines


def _disk(prepared: Prepared) -> list[str]:
    """What a run takes of the disk. How much of what is there is made again is seen when it runs."""
    recipe, output = prepared.recipe, prepared.output
    needed = bytes_on_disk(recipe, prepared.sizes, prepared.config, prepared.dtype)
    there = sum(file.stat().st_size for file in output.rglob("*.safetensors")) if output.is_dir() else 0
    lines = [f"disk         about {needed / 2**30:.1f} GiB below {output}"]
    if there:
        stands = f"{there / 2**30:.1f} GiB are there; what is made again stands beside what it replaces"
        lines.append(f"             {stands} until it is whole")
    if tokens := cache_bytes(recipe):
        lines.append(f"             about {tokens / 2**30:.1f} GiB of tokens below {cache_of_text()}")
    return lines


def _writing(recipe: Recipe) -> list[str]:
    lines = []
    for entry in recipe.write:
        if entry.kind == "traces":
            source = entry.problems.data or f"reasoning-gym {entry.problems.generator}"
            count = "all" if entry.limit is None else f"{entry.limit:,}"
            what = f"{entry.samples} replies to each of {count} problems of {source}, keeps {entry.keep}"
        else:
            what = f"{entry.tokens:,} tokens of the teacher's own text"
        lines.append(
            f"write        @{entry.name}: {what}; at most {entry.max_new_tokens:,} tokens each, temperature "
            f"{entry.temperature}"
        )
    return lines


def render_plan(prepared: Prepared, *, processes: int = 1) -> str:
    """The text that `dry_run=true` prints."""
    recipe, config, geometry, dtype = prepared.recipe, prepared.config, prepared.geometry, prepared.dtype
    sizes = prepared.sizes
    left_out = recipe.evaluate.generated if prepared.evaluation.on else []
    g = geometry
    query = "full rank" if g.q_lora_rank is None else f"rank {g.q_lora_rank}"
    launch, hours = launch_of_environment(), hours_of(recipe, prepared.output, processes)
    lines = [
        f"recipe       {recipe.name} (seed {recipe.seed})",
        f"source       {recipe.model.source} ({config.model_type}, {g.num_hidden_layers} layers, hidden "
        f"{g.hidden_size}, "
        f"{g.num_attention_heads} query and {g.num_key_value_heads} key/value heads of {g.head_dim})",
        f"student      rope {g.qk_rope_head_dim} + latent {_latents(g)}, nope {g.qk_nope_head_dim}, value "
        f"{g.v_head_dim}, query {query}, freqfold {recipe.convert.freqfold}, collapse {g.collapse}",
        *([f"rotation     {describe_stock_rope(g.stock_rope)}"] if g.stock_rope else []),
        f"cache        {g.source_cache} -> {g.cache} values per token and layer ({-100 * g.saving:+.1f} %)",
        *_ranks(g),
        f"parameters   source {sizes.source:,}; student {sizes.student:,}, of which attention {sizes.attention:,}; "
        f"vocabulary of both {config.vocab_size:,}",
        f"hardware     {processes} x {prepared.device}, {str(dtype).removeprefix('torch.')}; {launch.describe()}",
        *([f"note         {_searched(recipe.convert)}"] if recipe.convert.searched else []),
        *([f"note         {prepared.notice}"] if prepared.notice else []),
        *(f"note         deterministic: {line}" for line in prepared.replaced),
        *(f"note         {line}" for line in unseen_files(recipe)),
        "",
        *_writing(recipe),
        f"convert      calibrate on {recipe.convert.calibration.tokens:,} tokens of "
        f"{', '.join(map(str, recipe.convert.calibration.data))}",
        *_memory(prepared.streaming),
    ]
    for index, stage in enumerate(recipe.recover):
        trained = sizes.trained(stage)
        parts = describe_parts(stage_parts(stage, sizes, config, dtype, launch))
        lines.append(
            f"recover.{index}    {stage.kind}: {stage.tokens:,} tokens of {', '.join(map(str, stage.data))}, "
            f"{steps_of(stage, processes):,} steps, trains {trained:,} parameters ({stage.train}), "
            f"about {parts} per device{_snapshot(stage, sizes)}{_kept_states(stage, config, dtype)}"
        )
        if hours[index] is not None:
            lines.append(f"             {hours[index]}")
        if (reason := misfit(stage, sizes, config, dtype, prepared.device, launch)) is not None:
            lines.append(f"             refused on this machine: recover.{index}: {reason}")
    lines += [
        f"export       {prepared.export.describe(recipe.export)}",
        *([f"             read by {', '.join(readers)}"] if (readers := prepared.export.readers) else []),
        *(f"             note: {note}" for note in prepared.export.notes),
        f"evaluate     {', '.join(recipe.evaluate.data)}: {recipe.evaluate.tokens:,} tokens each, windows of "
        f"{recipe.evaluate.max_length:,}",
        *_memory(prepared.evaluation),
        *([f"             left out: {', '.join(left_out)}"] if left_out else []),
        *(
            f"solve        {entry.name}: {entry.samples} to each problem, at most {entry.max_new_tokens:,} tokens "
            f"per reply"
            for entry in recipe.evaluate.solve
        ),
        *(f"             questions of {task.label}" for task in recipe.evaluate.tasks),
        *(f"             required: {requirement.describe()}" for requirement in recipe.evaluate.require),
        "",
        *_disk(prepared),
        *(
            f"writes       {prepared.output / name}"
            for name in ("converted/", "recovered/", "exported/", "report.json", "report.md", "figures/")
        ),
    ]
    return "\n".join(lines)
