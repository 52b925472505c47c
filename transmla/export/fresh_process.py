"""Reload check: a fresh process, in which this package cannot be imported, scores text with the exported model.

Run as a script it is that process; it imports nothing of the package. For a student in its own class the process
imports the package and nothing else differs. Tokens and scores go through pipes, so that no file is ever left behind.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PR_SET_PDEATHSIG = 1
ERROR = re.compile(r"[\w.]+(Error|Exception)\b")  # the first line of what an exception says, below its traceback
LONGEST = 600  # letters of a reason
LOADERS = {"stock": "stock transformers", "student": "transformers with transmla"}


def score(folder: Path, tokens: Tensor, *, stock: bool, by_module: bool = False) -> Tensor:
    """Load a directory with transformers; log-probabilities [n, L, V] in float32 of every next word.

    Whatever format the weights are stored in, they are multiplied in float32: rounded products would hide a mistake.

    Args:
        tokens: [n, L].
        stock: whether it must load without this package.
        by_module: weights are read when a module needs them, for a model that does not fit in memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    load_classes(stock=stock)
    if by_module:
        model = model_on_disk(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    if stock:
        assert type(model).__module__.startswith("transformers."), f"not a stock class: {type(model)}"
    with torch.no_grad():
        return torch.cat([normalised(model(row[None]).logits) for row in tokens])


def load_classes(*, stock: bool) -> None:
    """Import what models are loaded by."""
    importlib.import_module("transformers.modeling_utils")
    if not stock:
        importlib.import_module("transmla")


def normalised(logits: Tensor) -> Tensor:
    """Log-probabilities [..., V] in float32. `log_softmax` sums 150,000 words with an error of up to some 3e-5, more
    than what two programs differ by; `logsumexp` adds in another order and is within 1e-6."""
    logits = logits.float()
    return logits - logits.logsumexp(-1, keepdim=True)


def model_on_disk(folder: Path, **options: Any) -> PreTrainedModel:
    """transformers' model in float32 whose modules read their weights when they are called and let them go afterwards.

    Args:
        options: of `from_config`, such as `attn_implementation`.
    """
    import torch
    from accelerate import cpu_offload, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False, **options).eval()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    weights: Any = _StoredTensors(folder, tied)  # typed as a dictionary
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    return model


EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>gate|up|down)_proj\.weight")


class _StoredTensors(Mapping[str, "Tensor"]):
    """Tensors of a directory by name, each read when it is asked for. tied: other names of some.

    DeepSeek's experts, which are stored one by one, have the names and shapes that they have in the model too.
    """

    def __init__(self, folder: Path, tied: Mapping[str, str]) -> None:
        from safetensors import safe_open

        self.open = lambda file: safe_open(file, framework="pt")
        self.files: dict[str, Path] = {}
        index = folder / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.is_file() else None
        for file in [folder / name for name in names or ["model.safetensors"]]:
            with self.open(file) as stored:
                self.files |= dict.fromkeys(stored.keys(), file)
        self.names = {name: name for name in self.files}
        self.names |= {name: other for name, other in tied.items() if other in self.files}
        self.experts: dict[str, int] = {}  # how many a tensor of the model has
        for expert in filter(None, map(EXPERT.fullmatch, self.files)):
            name = f"{expert['experts']}.{'down_proj' if expert['matrix'] == 'down' else 'gate_up_proj'}"
            self.experts[name] = max(self.experts.get(name, 0), int(expert["number"]) + 1)
        self.names |= {name: name for name in self.experts}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.experts:
            return self._stacked(name)
        stored = self.names[name]
        with self.open(self.files[stored]) as file:
            return file.get_slice(stored)[...].float()

    def _stacked(self, name: str) -> Tensor:
        """All experts' matrices in one: [E, D, I], or [E, 2 I, D] with gate above up."""
        import torch

        experts, _, matrix = name.rpartition(".")
        parts = ("down",) if matrix == "down_proj" else ("gate", "up")
        numbers = range(self.experts[name])
        rows = [[self[f"{experts}.{number}.{part}_proj.weight"] for part in parts] for number in numbers]
        return torch.stack([torch.cat(row) for row in rows])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class FreshProcess:
    """A process in which importing `transmla` fails, or, for a checkpoint that is not stock, does not. It imports what
    it needs as soon as it is made, which takes seconds that its maker has other uses for, and loads a checkpoint when
    it is asked for scores.

    Args:
        stock: whether a checkpoint must load without this package.
    """

    def __init__(self, *, stock: bool) -> None:
        # -P and no PYTHONPATH: neither the current directory nor this file's is searched for modules.
        self.kind = "stock" if stock else "student"
        command = [sys.executable, "-P", str(Path(__file__).resolve()), self.kind]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if not stock:  # the package that wrote the checkpoint, not another one that may be installed
            environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        # Without a name: it is gone with this process.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # __exit__ closes it
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, env=environment)

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def waits(self) -> bool:
        """Whether it is there and can be asked."""
        return self._process.poll() is None

    def end(self) -> None:
        """End the process, whatever it is at."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def score(self, folder: Path, tokens: Tensor, *, by_module: bool = False) -> Tensor:
        """`score` there, once.

        Raises:
            RuntimeError: the checkpoint does not load; the message ends with the reason, on one line.
        """
        import torch

        asked = {"folder": str(folder), "tokens": tokens.tolist(), "by_module": by_module}
        given = json.dumps(asked).encode() + b"\n"
        printed, _ = self._process.communicate(given)
        if self._process.returncode:
            self._errors.seek(0)
            reason = reason_of(self._process.returncode, self._errors.read().decode(errors="replace"))
            raise RuntimeError(f"{LOADERS[self.kind]} cannot load {folder}: {reason}")
        shape, _, scores = printed.partition(b"\n")
        return torch.frombuffer(bytearray(scores), dtype=torch.float32).view(json.loads(shape))


def reason_of(code: int, printed: str) -> str:
    """Why a process failed, on one line."""
    if code == -signal.SIGKILL:
        return "the process was killed, most likely for want of memory"
    if code < 0:
        return f"the process ended with {signal.Signals(-code).name}"
    lines = printed.strip().splitlines() or ["no output"]
    last = next((place for place in reversed(range(len(lines))) if ERROR.match(lines[place])), len(lines) - 1)
    more = takewhile(lambda line: line.startswith(" "), lines[last + 1 :])  # what such a message says further
    return " ".join([lines[last], *(line.strip() for line in more)])[:LONGEST]


class _Refuse:
    """An import hook for which `transmla` does not exist, even where it is installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "transmla":
            raise ModuleNotFoundError(f"No module named {name!r} (hidden from the reload check)")


def main(kind: str) -> None:
    """The checkpoint, tokens and how to load as a line of JSON on standard input; on standard output a line with the
    shape of the scores, then their bytes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody waits for the scores of a killed run
    out: Any = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no score
    if kind == "stock":
        sys.meta_path.insert(0, _Refuse)
    import torch

    load_classes(stock=kind == "stock")
    given = json.loads(sys.stdin.readline())  # not to its end: what its maker forked meanwhile may keep the pipe open
    folder, tokens = Path(given["folder"]), torch.tensor(given["tokens"])
    scores = score(folder, tokens, stock=kind == "stock", by_module=given["by_module"])
    out.write(json.dumps(scores.shape).encode() + b"\n")
    for row in scores:  # row by row: bytes of all of them would be a second copy
        out.write(row.contiguous().numpy().tobytes())
    out.close()


if __name__ == "__main__":
    main(sys.argv[1])
