"""Where the engines are: in this environment, or in one that a variable names."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# An engine's package, and the variable that names the python of an environment with it.
PLACES = {
    "vllm": ("vllm", "TRANSMLA_VLLM_PYTHON"),
    "vllm-transformers": ("vllm", "TRANSMLA_VLLM_PYTHON"),
    "llama.cpp": ("llama_cpp", "TRANSMLA_LLAMA_CPP_PYTHON"),
}
FIND = (
    "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"  # imports take half a minute
)


def python_of(engine: str) -> Path | None:
    """The python that has an engine; None: this one. Skips the test where there is none."""
    if engine not in PLACES:
        return None
    package, variable = PLACES[engine]
    python = os.environ.get(variable)
    if not _there(python or sys.executable, package):
        pytest.skip(f"{package} is not installed: {variable} names a python that has it")
    return Path(python) if python else None


@cache
def _there(python: str, package: str) -> bool:
    return subprocess.run([python, "-c", FIND, package], capture_output=True).returncode == 0
