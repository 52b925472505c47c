"""How the processes of a run were started, as `accelerate launch` tells them through the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from transmla.errors import RecipeError

Layout = Literal["whole", "fsdp2", "zero2", "zero3"]

# What accelerate and transformers would act on themselves; shards are made here (transmla.recover.shards).
FSDP = "ACCELERATE_USE_FSDP"


def layout() -> Layout:
    """Where weights, gradients and moments lie: `whole` on every process, or in shards.

    Raises:
        RecipeError: the launch file asks for a way that no stage runs in.
    """
    if _on(FSDP):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise RecipeError("launch", "FSDP of version 1 is not used; start with accelerate_configs/fsdp2.yaml")
        return "fsdp2"
    if _on("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("2", "3"):
            raise RecipeError("launch", f"ZeRO {stage} is not used; start with accelerate_configs/zero2.yaml or zero3")
        return "zero2" if stage == "2" else "zero3"
    return "whole"


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


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
