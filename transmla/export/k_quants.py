"""Who makes llama.cpp's k-quants: its own quantiser, as a program or in llama-cpp-python."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from transmla.errors import RecipeError
from transmla.export.engines_asked import EngineError, ask
from transmla.export.gguf_tensors import KEPT

PROGRAM = "llama-quantize"
FILE_TYPES = {"q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
Quantise = Callable[[Path, Path], None]


def find_quantiser(kind: str, python: Path | None, key: str) -> Quantise:
    """What makes a file of a kind from a bfloat16 one.

    Args:
        python: of the environment with llama-cpp-python. key: for errors.

    Raises:
        RecipeError: there is none.
    """
    kept = [rf"{name}\.weight" for name in KEPT]

    def by_program(file: Path, out: Path) -> None:
        options = [word for pattern in kept for word in ("--tensor-type", f"{pattern}=bf16")]
        command = [PROGRAM, *options, str(file), str(out), kind]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise RecipeError(key, f"{PROGRAM} ended with {done.returncode}: {last}; try --type q8_0")

    def by_package(file: Path, out: Path) -> None:
        request: dict[str, Any] = {"model": str(file), "out": str(out), "kept": kept, "file_type": FILE_TYPES[kind]}
        request["kept_type"] = int(GGMLQuantizationType.BF16)
        try:
            ask("llama.cpp", python, key, do="quantise", **request)
        except EngineError as error:
            raise RecipeError(key, f"llama.cpp does not quantise: {error}; try --type q8_0") from None

    if python is None and shutil.which(PROGRAM):
        return by_program
    try:
        ask("llama.cpp", python, key, do="probe")
    except (RecipeError, EngineError) as error:
        reason = error.problem if isinstance(error, RecipeError) else error
        flags = " ".join(f"--tensor-type '{pattern}=bf16'" for pattern in kept)
        raise RecipeError(
            key,
            f"{kind} is made by llama.cpp's own quantiser, and there is neither {PROGRAM} on the PATH nor "
            f"llama-cpp-python: {reason}; or write --type bf16, and where llama.cpp is: "
            f"{PROGRAM} {flags} IN OUT {kind}",
        ) from None
    return by_package
