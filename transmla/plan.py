"""The plan of a recipe, computed without weights: what would be made, how large, where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig

from transmla.families import family_of
from transmla.geometry import MLAGeometry
from transmla.modeling.student import ATTENTION, adapted_layers, student_config
from transmla.recipe import Convert, Recipe
from transmla.recipe_stages import QUERIES, AnyStage, OnPolicy

if TYPE_CHECKING:
    from transmla.preflight import Prepared


@dataclass(frozen=True)
class Sizes:
    """Parameters of source and student, counted on meta tensors; `adapters`: of one rank on all layers that may have one."""

    source: int
    student: int
    attention: int
    adapters: dict[str, int]

    def trained(self, stage: AnyStage) -> int:
        """How many a stage trains."""
        if stage.train == "lora":
            return stage.lora.r * self.adapters[stage.lora.targets]
        return self.student if stage.train == "all" else self.attention


def count_parameters(config: PretrainedConfig, geometry: MLAGeometry) -> Sizes:
    """Numbers of parameters, tied ones once."""
    family = family_of(config)
    with init_empty_weights():
        source = AutoModelForCausalLM.from_config(config)
        student = family.student_model(student_config(config, geometry, family))
    source.tie_weights()
    student.tie_weights()
    attention = sum(value.numel() for name, value in student.named_parameters() if ATTENTION in name)
    return Sizes(
        source=sum(value.numel() for value in source.parameters()),
        student=sum(value.numel() for value in student.parameters()),
        attention=attention,
        adapters={
            targets: sum(layer.in_features + layer.out_features for layer in adapted_layers(student, targets).values())
            for targets in ("attention", "all")
        },
    )


def micro_batch(stage: AnyStage) -> int:
    """Tokens a device handles at a time."""
    on_policy = isinstance(stage, OnPolicy)
    length = stage.prompt_tokens + stage.max_new_tokens if on_policy else int(stage.trainer.get("max_length", 1024))
    return length * int(stage.trainer.get("per_device_train_batch_size", 1))


def rows_of_a_step(stage: AnyStage) -> int:
    """Rows that one process handles in an optimizer step."""
    return int(stage.trainer.get("per_device_train_batch_size", 1)) * int(stage.trainer.get("gradient_accumulation_steps", 1))


def steps_of(stage: AnyStage, processes: int) -> int:
    """Optimizer steps that the stage's token budget gives, at least one."""
    batch = micro_batch(stage) * int(stage.trainer.get("gradient_accumulation_steps", 1)) * processes
    return max(1, stage.tokens // batch)


def training_memory(stage: AnyStage, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Rough bytes a device needs for a stage without sharding: weights, gradients, AdamW, activations, logits."""
    width = torch.finfo(dtype).bits // 8
    everything = stage.train == "all"
    trained = sizes.trained(stage)
    shared = 0 if everything else sizes.student - sizes.attention
    teacher = 0 if stage.kind == "sft" or (stage.kind == "distill" and stage.teacher == "recorded") else sizes.source
    if teacher == 0 or (stage.kind == "distill" and not isinstance(stage.teacher, str)):
        shared = 0  # another teacher's own size is not known here: it is taken for the source's
    weights = width * (teacher + sizes.student - shared) + (4 - width) * trained  # trained weights in float32
    optimizer = 12 * trained  # gradient and two moments in float32
    tokens = micro_batch(stage)
    checkpointing = stage.trainer.get("gradient_checkpointing", False)
    # Numbers saved for the backward pass by token and layer: the attention's alone, or the whole layer's; a compiled layer saves
    # fewer (26 GiB in all were measured with 32,768 tokens of SmolLM2-135M, where 24 make 28).
    compiled = getattr(stage, "compile", False)
    saved = 12 if stage.kind == "layerwise" else 2 if checkpointing else 24 if compiled else 34
    per_layer = config.hidden_size * saved
    activations = tokens * config.num_hidden_layers * per_layer * width
    if stage.kind == "layerwise" and stage.logits:  # logits and two distributions of a sample of queries, until the backward pass
        activations += 10 * config.num_hidden_layers * config.num_attention_heads * tokens * QUERIES
    logits = 3 * min(tokens, 1024) * config.vocab_size * 4 if stage.kind in ("distill", "sft") else 0
    if stage.kind == "on_policy":  # a tile of logits of each model, and the gradients of the head's input
        logits = 3 * min(tokens, 4096) * min(config.vocab_size, 32768) * 4
    return weights + optimizer + activations + logits


def bytes_on_disk(recipe: Recipe, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that a whole run needs at its fullest: every model, the teacher's states, one stage's checkpoints, and what
    the teacher writes or says: its text, as it was drawn and as rows, and recorded distributions."""
    width = torch.finfo(dtype).bits // 8
    models = (1 + len(recipe.recover)) * width * sizes.student
    export_width = width if recipe.export.dtype == "auto" else torch.finfo(getattr(torch, recipe.export.dtype)).bits // 8
    exported = export_width * (sizes.student + config.vocab_size * config.hidden_size)  # the head is never tied
    states = len(recipe.evaluate.data) * (recipe.evaluate.tokens + config.vocab_size) * config.hidden_size * width
    checkpoints = 0
    for stage in recipe.recover:
        trained = sizes.trained(stage)
        one = 12 * trained + width * (sizes.student - trained)  # float32 masters, two moments; the rest as it is
        kept = int(stage.trainer.get("save_total_limit") or 2) + 1  # the newest is whole before the oldest goes
        checkpoints = max(checkpoints, kept * one)
    return models + exported + states + checkpoints + _written_bytes(recipe) + _recorded_bytes(recipe)


def _written_bytes(recipe: Recipe) -> int:
    """Rough bytes of `write`, at most: a token is some 6 as a number, there twice, and 5 as text. How many problems a data set
    has is not known here: its traces count where `limit` says."""
    tokens = 0
    for entry in recipe.write:
        if entry.kind == "text":
            tokens += entry.tokens
        else:
            size = entry.problems.size if entry.problems.data is None else entry.limit or 0
            tokens += entry.samples * entry.max_new_tokens * min(size, entry.limit or size)
    return 17 * tokens


def _recorded_bytes(recipe: Recipe) -> int:
    """Rough bytes of recordings below the output directory: deflated, an entry takes 2.5 to 3 in 16 bits (README)."""
    stages = [stage for stage in recipe.recover if stage.kind == "distill" and stage.teacher == "recorded"]
    width = {"float16": 3, "bfloat16": 3, "float32": 5}
    return sum(
        stage.tokens * stage.record.top_k * width[stage.record.dtype] for stage in stages if stage.record.folder is None
    )


def _kept_states(stage: AnyStage, config: PretrainedConfig, dtype: torch.dtype) -> str:
    """What a kept teacher takes besides; how many rows the data has is not known before it is tokenized."""
    if not (stage.kind == "distill" and stage.keep_teacher):
        return ""
    width = config.hidden_size if isinstance(stage.teacher, str) else 0  # another teacher's is not known here
    if not width:
        return ", and the teacher's states of every row of the data"
    row = int(stage.trainer.get("max_length", 1024)) * width * torch.finfo(dtype).bits // 8
    return f", and {row / 2**20:.1f} MiB for every row of the data, for the teacher's states"


def _searched(section: Convert) -> str:
    names = ("qk_rope_head_dim", "kv_lora_rank", "collapse", "freqfold", "mean_rotation")
    free = [name for name in names if getattr(section, name) == "auto"]
    provisional = [name for name in free if name not in ("freqfold", "mean_rotation")]
    shown = f"; the {', '.join(provisional)} of this plan are one of the candidates" if provisional else ""
    return f"a search on held-out calibration text chooses {', '.join(free)}{shown}"


def _writing(recipe: Recipe) -> list[str]:
    lines = []
    for entry in recipe.write:
        if entry.kind == "traces":
            source = entry.problems.data or f"reasoning-gym {entry.problems.generator}"
            count = "all" if entry.limit is None else f"{entry.limit:,}"
            what = f"{entry.samples} replies to each of {count} problems of {source}, keeps {entry.keep}"
        else:
            what = f"{entry.tokens:,} tokens of the teacher's own text"
        lines.append(f"write        @{entry.name}: {what}; at most {entry.max_new_tokens:,} tokens each, temperature {entry.temperature}")
    return lines


def render_plan(prepared: Prepared, *, processes: int = 1) -> str:
    """The text that `dry_run=true` prints."""
    recipe, config, geometry, dtype = prepared.recipe, prepared.config, prepared.geometry, prepared.dtype
    sizes = count_parameters(config, geometry)
    g = geometry
    query = "full rank" if g.q_lora_rank is None else f"rank {g.q_lora_rank}"
    lines = [
        f"recipe       {recipe.name} (seed {recipe.seed})",
        f"source       {recipe.model.source} ({config.model_type}, {g.num_hidden_layers} layers, hidden {g.hidden_size}, "
        f"{g.num_attention_heads} query and {g.num_key_value_heads} key/value heads of {g.head_dim})",
        f"student      rope {g.qk_rope_head_dim} + latent {g.kv_lora_rank}, nope {g.qk_nope_head_dim}, value "
        f"{g.v_head_dim}, query {query}, freqfold {recipe.convert.freqfold}, collapse {g.collapse}",
        f"cache        {g.source_cache} -> {g.cache} values a token and layer ({-100 * g.saving:+.1f} %)",
        f"parameters   source {sizes.source:,}; student {sizes.student:,}, of which attention {sizes.attention:,}",
        f"hardware     {processes} x {prepared.device}, {str(dtype).removeprefix('torch.')}",
        *([f"note         {_searched(recipe.convert)}"] if recipe.convert.searched else []),
        *([f"note         {prepared.notice}"] if prepared.notice else []),
        "",
        *_writing(recipe),
        f"convert      calibrate on {recipe.convert.calibration.tokens:,} tokens of "
        f"{', '.join(map(str, recipe.convert.calibration.data))}",
    ]
    for index, stage in enumerate(recipe.recover):
        trained = sizes.trained(stage)
        memory = training_memory(stage, sizes, config, dtype) / 2**30
        lines.append(
            f"recover.{index}    {stage.kind}: {stage.tokens:,} tokens of {', '.join(map(str, stage.data))}, "
            f"{steps_of(stage, processes):,} steps, trains {trained:,} parameters ({stage.train}), "
            f"about {memory:.1f} GiB a device{_kept_states(stage, config, dtype)}"
        )
    lines += [
        f"export       {prepared.export.describe(recipe.export)}",
        f"evaluate     {', '.join(recipe.evaluate.data)}: {recipe.evaluate.tokens:,} tokens each, windows of "
        f"{recipe.evaluate.max_length:,}",
        *(f"solve        {entry.name}: {entry.samples} to each problem, at most {entry.max_new_tokens:,} tokens a reply" for entry in recipe.evaluate.solve),
        *(f"             questions of {task.label}" for task in recipe.evaluate.tasks),
        *(f"             required: {requirement.describe()}" for requirement in recipe.evaluate.require),
        "",
        f"disk         about {bytes_on_disk(recipe, sizes, config, dtype) / 2**30:.1f} GiB below {prepared.output}",
        *(f"writes       {prepared.output / name}" for name in ("converted/", "recovered/", "exported/", "report.json", "report.md", "figures/")),
    ]
    return "\n".join(lines)
