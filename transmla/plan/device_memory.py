"""Whether a stage fits on the device that it is to train on, and the cheapest ways out where it does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig

from transmla.hardware import free_memory
from transmla.plan.launched import LAUNCH_FILES, Launch
from transmla.plan.memory import Sizes, memory_by_part, model_parameters
from transmla.recipe.launch_file import IN_PARTS
from transmla.recipe.names import share
from transmla.recipe.stages import AnyStage, OnPolicy

GIB = 2**30
SURE = 0.9  # a stage is refused where this share of the estimate is more than the device has
WAYS = 3  # that a refusal names


def stage_parts(
    stage: AnyStage, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype, launch: Launch
) -> dict[str, int]:
    """Bytes that a stage needs of each device as it is launched, by part (`memory_by_part`)."""
    return memory_by_part(
        stage, sizes, config, dtype, layout=launch.layout, processes=launch.processes, offloaded=launch.offloaded
    )


def loaded_bytes(stage: AnyStage, sizes: Sizes, dtype: torch.dtype, launch: Launch) -> int:
    """Bytes that the models of a stage take of a device before they are put in shards; 0 where they never are."""
    if launch.layout not in IN_PARTS:
        return 0
    return torch.finfo(dtype).bits // 8 * model_parameters(stage, sizes, apart=True)


def describe_parts(parts: dict[str, int]) -> str:
    """For a plan or a refusal: the total, and the parts that are more than a hundredth of it."""
    total = sum(parts.values())
    shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if 100 * size > total)
    return f"{total / GIB:.1f} GiB ({shown})"


def room_of(device: str, launch: Launch) -> tuple[int, str]:
    """Bytes that this process may take of its device, and the device's name."""
    if device == "cuda":
        place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # no context on another's GPU
        return free_memory(torch.device(place)), place
    return free_memory(torch.device("cpu")) // launch.here, "the machine's memory" + (
        f" for each of {launch.here} processes" if launch.here > 1 else ""
    )


def misfit(
    stage: AnyStage, sizes: Sizes, config: PretrainedConfig, dtype: torch.dtype, device: str, launch: Launch
) -> str | None:
    """Why a stage does not fit, with the cheapest ways out; None: it does, as far as can be told."""
    parts, (room, place) = stage_parts(stage, sizes, config, dtype, launch), room_of(device, launch)
    loaded = loaded_bytes(stage, sizes, dtype, launch)
    if loaded > room:
        return (
            f"student and teacher are loaded whole before they are put in shards, {loaded / GIB:.1f} GiB, and "
            f"{room / GIB:.1f} GiB of {place} are free; use devices with more memory"
        )
    if SURE * sum(parts.values()) <= room:
        return None
    ways = []
    for words, other, otherwise in _ways_out(stage, launch, device):
        needed = sum(stage_parts(other, sizes, config, dtype, otherwise).values())
        needed = max(needed, loaded_bytes(other, sizes, dtype, otherwise))
        if needed <= room:
            ways.append(f"{words} ({needed / GIB:.1f} GiB)")
    out = f"cheapest ways out: {'; '.join(ways[:WAYS])}" if ways else "use shorter rows, or devices with more memory"
    return (
        f"it needs about {describe_parts(parts)} of each device ({launch.describe()}), and {room / GIB:.1f} GiB of "
        f"{place} are free; {out}"
    )


def _ways_out(stage: AnyStage, launch: Launch, device: str) -> Iterator[tuple[str, AnyStage, Launch]]:
    """What to change, the stage and the launch with it; what costs least first. Each way is tried alone, then with rows
    one at a time."""
    batches = list(_smaller_batches(stage))
    for words, smaller in batches:
        yield words, smaller, launch
    for words, other, otherwise in _other_ways(stage, launch, device):
        yield words, other, otherwise
        if batches:
            yield f"{words} with {batches[-1][0]}", _with(other, batches[-1][1].trainer), otherwise


def _smaller_batches(stage: AnyStage) -> Iterator[tuple[str, AnyStage]]:
    """The same global batch in more steps of accumulation."""
    batch = int(stage.trainer.get("per_device_train_batch_size", 1))
    steps = int(stage.trainer.get("gradient_accumulation_steps", 1))
    for smaller in (size for size in range(batch // 2, 0, -1) if batch % size == 0):
        split = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": steps * batch // smaller}
        yield ", ".join(f"trainer.{key}={value}" for key, value in split.items()), _with(stage, split)


def _other_ways(stage: AnyStage, launch: Launch, device: str) -> Iterator[tuple[str, AnyStage, Launch]]:
    for layout, file in LAUNCH_FILES.items() if device == "cuda" else ():
        if layout in ("whole", launch.layout) or not (share("accelerate_configs") / file).is_file():
            continue
        for processes in sorted({launch.processes, 2, 4, 8}):
            if processes >= max(2, launch.processes):
                words = f"accelerate_configs/{file} on {processes} GPUs"
                yield words, stage, replace(launch, layout=layout, processes=processes, offloaded=())
    if not stage.trainer.get("gradient_checkpointing") and stage.kind in ("distill", "sft"):
        yield "trainer.gradient_checkpointing=true", _with(stage, {"gradient_checkpointing": True}), launch
    if stage.train == "all":
        yield "train=attention", stage.model_copy(update={"train": "attention"}), launch
    if stage.train != "lora" and not isinstance(stage, OnPolicy):
        yield "train=lora", stage.model_copy(update={"train": "lora"}), launch


def _with(stage: AnyStage, keys: dict[str, Any]) -> AnyStage:
    return stage.model_copy(update={"trainer": stage.trainer | keys})
