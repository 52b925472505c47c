"""Ask an engine in its own environment: a process of another Python, files between the two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transmla.errors import RecipeError
from transmla.export.engine_process import ABSENT
from transmla.export.fresh_process import reason_of
from transmla.files import temporary_folder

SCRIPT = Path(__file__).with_name("engine_process.py")
INSTALL = {
    "transformers": "pip install transformers torch",
    "vllm": "pip install vllm",
    "vllm-transformers": "pip install vllm",
    "llama.cpp": "pip install llama-cpp-python",
}


class EngineError(Exception):
    """An engine that is there and does not do what it is asked; the message says why, on one line."""


@dataclass(frozen=True)
class Answers:
    """arrays: by name. said: what the engine says beside them; `version` is always there."""

    arrays: dict[str, np.ndarray]
    said: dict[str, Any]


def ask(engine: str, python: Path | None, key: str, *, own_class: bool = False, **request: Any) -> Answers:
    """What an engine answers.

    Args:
        python: of the environment that the engine is installed in; None: this one.
        key: for errors. own_class: whether the checkpoint is of a class that transmla brings.

    Raises:
        RecipeError: the engine, or the Python, is not there.
        EngineError: it failed.
    """
    program = str(python or sys.executable)
    if python is not None and not (python.is_file() and os.access(python, os.X_OK)):
        raise RecipeError(key, f"--python {python} is no program that can be run; name the python of an environment")
    with temporary_folder() as folder, tempfile.TemporaryFile() as errors:
        (folder / "request.json").write_text(
            json.dumps(request | {"engine": engine, "own_class": own_class}), encoding="utf-8"
        )
        # No PYTHONPATH: the engine's environment alone. In this one, this package is where it was imported from.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if own_class and python is None:
            environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        command = [program, str(SCRIPT), str(folder / "request.json"), str(folder)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment)
        except OSError as error:  # a file of another processor, or without an interpreter
            raise RecipeError(
                key, f"{program} cannot be run: {error.strerror}; name the python of an environment"
            ) from None
        if done.returncode:
            errors.seek(0)
            reason = reason_of(done.returncode, errors.read().decode(errors="replace"))
            if done.returncode == ABSENT:
                name, how = engine, INSTALL[engine]
                if own_class:
                    name, how = f"{name} with transmla", f"{how} transmla"
                raise RecipeError(
                    key,
                    f"{name} is not in {program} ({reason}); install it there ({how}), or name the "
                    "python of another environment with --python PATH",
                )
            raise EngineError(reason)
        said = json.loads((folder / "answer.json").read_bytes())
        arrays = folder / "answer.npz"
        content = dict(np.load(arrays)) if arrays.is_file() else {}
        return Answers(content, said)
