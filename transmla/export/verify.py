"""Reload check: a fresh process, in which this package cannot be imported, scores text with the exported model.

Run as a script it is that process; it imports nothing of the package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def score(folder: str, tokens_file: str, out_file: str) -> None:
    """Load a directory with stock transformers and write log-probabilities of every next word.

    Whatever format the weights are stored in, they are multiplied in float32: rounded products would hide a mistake.

    tokens_file: safetensors with `input_ids` [n, L]. out_file: safetensors with `log_probs` [n, L, V] in float32.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers."), f"not a stock class: {type(model)}"
    tokens = load_file(tokens_file)["input_ids"]
    with torch.no_grad():
        log_probs = torch.cat([model(row[None]).logits.float().log_softmax(-1) for row in tokens])
    save_file({"log_probs": log_probs}, out_file)


def score_in_fresh_process(folder: Path, tokens_file: Path, out_file: Path) -> None:
    """Run `score` where importing `transmla` fails.

    Raises:
        RuntimeError: the checkpoint does not load there; the message ends with the reason.
    """
    # -P and no PYTHONPATH: neither the current directory nor this file's is searched for modules.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *map(str, (folder, tokens_file, out_file))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"export: stock transformers cannot load {folder}: {reason}")


class _Refuse:
    """An import hook for which `transmla` does not exist, even where it is installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "transmla":
            raise ModuleNotFoundError(f"No module named {name!r} (hidden from the reload check)")


if __name__ == "__main__":
    sys.meta_path.insert(0, _Refuse)
    score(*sys.argv[1:])
