"""Reload check: a fresh process, in which this package cannot be imported, scores text with the exported model.

Run as a script it is that process; it imports nothing of the package. For a student in its own class the process
imports the package and nothing else differs.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path


def score(folder: str, tokens_file: str, out_file: str, stock: str) -> None:
    """Load a directory with stock transformers and write log-probabilities of every next word.

    Whatever format the weights are stored in, they are multiplied in float32: rounded products would hide a mistake.

    tokens_file: safetensors with `input_ids` [n, L]. out_file: safetensors with `log_probs` [n, L, V] in float32.
    stock: `stock`, or `student` for a checkpoint that needs `import transmla`.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    if stock == "student":
        importlib.import_module("transmla")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    if stock == "stock":
        assert type(model).__module__.startswith("transformers."), f"not a stock class: {type(model)}"
    tokens = load_file(tokens_file)["input_ids"]
    with torch.no_grad():
        log_probs = torch.cat([model(row[None]).logits.float().log_softmax(-1) for row in tokens])
    save_file({"log_probs": log_probs}, out_file)


def score_in_fresh_process(folder: Path, tokens_file: Path, out_file: Path, *, stock: bool) -> None:
    """Run `score` where importing `transmla` fails, or, for a checkpoint that is not stock, where it does not.

    Raises:
        RuntimeError: the checkpoint does not load there; the message ends with the reason.
    """
    # -P and no PYTHONPATH: neither the current directory nor this file's is searched for modules.
    words = [*map(str, (folder, tokens_file, out_file)), "stock" if stock else "student"]
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if not stock:  # the package that wrote the checkpoint, not another one that may be installed
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        loader = "stock transformers" if stock else "transformers with transmla"
        raise RuntimeError(f"export: {loader} cannot load {folder}: {reason}")


class _Refuse:
    """An import hook for which `transmla` does not exist, even where it is installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "transmla":
            raise ModuleNotFoundError(f"No module named {name!r} (hidden from the reload check)")


if __name__ == "__main__":
    if sys.argv[4] == "stock":
        sys.meta_path.insert(0, _Refuse)
    score(*sys.argv[1:])
