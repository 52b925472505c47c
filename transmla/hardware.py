"""What the machine can do: device, number format, free disk and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import shutil
from pathlib import Path

import psutil
import torch

from transmla.errors import RecipeError

COMPILERS = ("cc", "gcc", "clang", "g++", "clang++")


def resolve_device(wanted: str) -> str:
    """`cuda` or `cpu` from the recipe's `device`.

    Raises:
        RecipeError: CUDA was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device", "cuda was asked for, but no CUDA device is visible; use device=cpu or device=auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def resolve_dtype(wanted: str, device: str) -> torch.dtype:
    """Number format of weights and products. `auto`: bfloat16 on a GPU and on CPUs that have instructions for it.

    A CPU without them multiplies bfloat16 up to a hundred times slower than float32.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def use_cores(wanted: int | str, processes_here: int) -> None:
    """Set the threads of this process for CPU work.

    `accelerate launch` starts a process with OMP_NUM_THREADS=1 unless told otherwise, which halves the speed of two
    cores; `auto` shares the cores of the machine out among its processes instead. Outside a launcher the environment
    is left as it is.
    """
    if wanted == "auto":
        if "ACCELERATE_MIXED_PRECISION" not in os.environ and processes_here == 1:
            return
        wanted = max(1, len(os.sched_getaffinity(0)) // processes_here)
    torch.set_num_threads(int(wanted))


def has_compiler() -> bool:
    """Whether there is a C compiler, which torch.compile and Triton call."""
    return "CC" in os.environ or "CXX" in os.environ or any(map(shutil.which, COMPILERS))


def require_disk(folder: Path, needed: int, key: str = "output_dir") -> None:
    """Check that `needed` bytes are free where `folder` will be. key: the recipe's, for the message.

    Raises:
        RecipeError: they are not.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise RecipeError(
            key, f"{needed / 2**30:.1f} GiB are needed below {folder}, {free / 2**30:.1f} are free; make room"
        )


def disk_of(folder: Path) -> int:
    """The disk on which a folder is or will be."""
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    return existing


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors may take on a GPU, or in the memory of the machine."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()  # what the allocator holds of tensors that are gone is free too
    return torch.cuda.mem_get_info(device)[0]


def trim_memory() -> None:
    """Give back to the system what the C library keeps of tensors that are gone; in a loop over layers it grows."""
    gc.collect()  # some are held by cycles, such as an exception and its frames
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def peak_memory(device: str) -> int:
    """Largest memory use so far, in bytes: of the GPU's allocator, or of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: str) -> None:
    """Start a new measurement where the device supports it (a process's own peak cannot be reset)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
