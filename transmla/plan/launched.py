"""How the processes of a run were started: where weights, gradients and moments lie, and how many share a machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transmla.errors import RecipeError

LAUNCH_FILES = {"whole": "ddp.yaml", "fsdp2": "fsdp2.yaml", "zero2": "zero2.yaml", "zero3": "zero3.yaml"}


@dataclass(frozen=True)
class Launch:
    """layout: `whole` on every process, or `fsdp2`, `zero2`, `zero3`. processes: of the run. here: of them on this
    machine. offloaded: what DeepSpeed keeps in the host's memory, `optimizer` or `weights`."""

    layout: str = "whole"
    processes: int = 1
    here: int = 1
    offloaded: tuple[str, ...] = ()

    def describe(self) -> str:
        """For a plan."""
        ways = {"whole": "replicated", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
        kept = f", {' and '.join(self.offloaded)} in the host's memory" if self.offloaded else ""
        return f"{self.processes} processes, {ways[self.layout]}{kept}" if self.processes > 1 else "one process"


# What a launch file may ask for that no stage of this project runs in, by the variable that accelerate sets for it.
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not used; start with a file of accelerate_configs",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config is not used; start with a file of accelerate_configs",
}


def check_launch() -> None:
    """Refuse what a launch file asks for and no stage runs in.

    Raises:
        RecipeError: names the launch file's entry.
    """
    for name, reason in REFUSED.items():
        if _on(name):
            raise RecipeError("launch", reason)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", ""):
        raise RecipeError(
            "launch",
            f"dynamo_config: the launch file compiles the whole model ({backend}); leave it out, and use "
            "recover.N.compile",
        )
    version, stage = os.environ.get("FSDP_VERSION", "1"), os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if _on("ACCELERATE_USE_FSDP") and version != "2":
        raise RecipeError(
            "launch", f"fsdp_version {version} is not used; use 2, or start with a file of accelerate_configs"
        )
    if _on("ACCELERATE_USE_DEEPSPEED") and stage not in ("2", "3"):
        raise RecipeError("launch", f"zero_stage {stage} is not used; use 2 or 3, or accelerate_configs/ddp.yaml")


def launch_of_environment() -> Launch:
    """What `accelerate launch` or torchrun told this process."""
    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if _on("ACCELERATE_USE_FSDP"):
        return Launch("fsdp2", processes, here, ("optimizer", "weights") if _on("FSDP_OFFLOAD_PARAMS") else ())
    if _on("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        where = {"optimizer": "OPTIMIZER", "weights": "PARAM"}
        kept = tuple(
            part
            for part, name in where.items()
            if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none") in ("cpu", "nvme")
        )
        return Launch("zero3" if stage == "3" else "zero2", processes, here, kept)
    return Launch("whole", processes, here)


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
