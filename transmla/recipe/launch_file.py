"""How the processes of a run were started, as `accelerate launch` tells them through the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from transmla.errors import RecipeError

if TYPE_CHECKING:
    from accelerate import PartialState

Layout = Literal["whole", "fsdp2", "zero2", "zero3"]

IN_PARTS = ("fsdp2", "zero3")  # no process has all weights

# What accelerate and transformers would act on themselves; shards are made here (transmla.recover.sharded_model).
FSDP = "ACCELERATE_USE_FSDP"


def layout() -> Layout:
    """Where weights, gradients and moments lie: `whole` on every process, or in shards.

    Raises:
        RecipeError: the launch file asks for a way that no stage runs in.
    """
    if asks(FSDP):
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise RecipeError("launch", f"fsdp_version {version} is not used; start with accelerate_configs/fsdp2.yaml")
        return "fsdp2"
    if asks("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("2", "3"):
            raise RecipeError(
                "launch", f"zero_stage {stage} is not used; start with accelerate_configs/zero2.yaml or zero3.yaml"
            )
        return "zero2" if stage == "2" else "zero3"
    return "whole"


def asks(name: str) -> bool:
    """Whether the launch file switches something on; name: of accelerate's variable for it."""
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def open_processes(device: str, timeout: timedelta) -> PartialState:
    """The processes of a run, each with its device; every one loads models whole, whatever the launch file says."""
    from accelerate import PartialState

    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)  # processes but the first would load nothing
    if layout().startswith("zero") and device == "cpu":  # accelerate leaves DeepSpeed out where it is told of a CPU
        return PartialState(backend="gloo", timeout=timeout)
    return PartialState(cpu=device == "cpu", timeout=timeout)


@contextmanager
def without_fsdp() -> Iterator[None]:
    """Meanwhile accelerate sees processes that replicate: it would shard what is sharded already, and on a CPU it would
    take replicas for shards."""
    asked = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[FSDP] = asked


def load_whole() -> None:
    """Let transformers load whole models again, after a configuration of ZeRO-3 told it to load shards."""
    if layout() == "zero3":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
