"""The process that a run lives in: what a bug report needs to know of it, and other libraries' notes silenced."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
import psutil
import torch
import transformers

from transmla import __version__
from transmla.hardware import resolve_device, resolve_dtype
from transmla.recipe.names import share
from transmla.sources.kinds import cache_folder

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface-hub",
    "hydra-core",
    "pydantic",
    "deepspeed",
    "vllm",
    "lm-eval",
    "math-verify",
    "reasoning-gym",
)
# Of the environment, what decides where things are and how processes are started; never a token.
VARIABLES = (
    "TRANSMLA_CACHE",
    "TRANSMLA_DATA",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "WORLD_SIZE",
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
)


def describe_environment() -> str:
    """Lines of name and value, for a terminal and for a bug report."""
    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    rows = [
        ("transmla", f"{__version__} in {Path(__file__).resolve().parents[1]}"),
        ("python", f"{platform.python_version()} in {sys.executable}"),
        ("system", f"{platform.platform()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.1f} GiB"),
        *((name, found) for name in PACKAGES if (found := package_version(name))),
        ("cuda", torch.version.cuda or "none"),
        *((f"cuda:{index}", _card(index)) for index in range(torch.cuda.device_count())),
        ("device", f"{device}, {dtype} where a recipe says auto"),
        ("recipes", str(share("recipes"))),
        ("cache", str(cache_folder())),
        *((name, os.environ[name]) for name in VARIABLES if name in os.environ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def package_version(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _card(index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    return f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, compute capability {facts.major}.{facts.minor}"


def quiet() -> None:
    """Silence other libraries' notes that a user of this program can do nothing about."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading; calibration, training and evaluation have their own
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
