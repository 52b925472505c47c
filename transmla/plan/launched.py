"""How the processes of a run were started: where weights, gradients and moments lie, and how many share a machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transmla.recipe.launch_file import Layout, asks, layout

LAUNCH_FILES: dict[Layout, str] = {
    "whole": "ddp.yaml",
    "fsdp2": "fsdp2.yaml",
    "zero2": "zero2.yaml",
    "zero3": "zero3.yaml",
}


@dataclass(frozen=True)
class Launch:
    """layout: `whole` on every process, or `fsdp2`, `zero2`, `zero3`. processes: of the run. here: of them on this
    machine. offloaded: what DeepSpeed keeps in the host's memory, `optimizer` or `weights`."""

    layout: Layout = "whole"
    processes: int = 1
    here: int = 1
    offloaded: tuple[str, ...] = ()

    def describe(self) -> str:
        """For a plan."""
        ways = {"whole": "replicated", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
        kept = f", {' and '.join(self.offloaded)} in the host's memory" if self.offloaded else ""
        return f"{self.processes} processes, {ways[self.layout]}{kept}" if self.processes > 1 else "one process"


def launch_of_environment() -> Launch:
    """What `accelerate launch` or torchrun told this process."""
    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    way = layout()
    if way == "fsdp2":
        return Launch(way, processes, here, ("optimizer", "weights") if asks("FSDP_OFFLOAD_PARAMS") else ())
    where = {"optimizer": "OPTIMIZER", "weights": "PARAM"} if way != "whole" else {}
    kept = tuple(
        part
        for part, name in where.items()
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none") in ("cpu", "nvme")
    )
    return Launch(way, processes, here, kept)
