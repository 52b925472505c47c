"""Rows of coming stages, made by a process beside the run while its GPU has other work.

A stage's rows take the CPU half a minute for 90 million tokens, and nothing of it needs the GPU, which waits meanwhile.
The process makes them as the stage will and leaves them where the stage looks first, in Datasets' cache; nothing else
passes between the two. Where it fails, the stage makes its rows itself, with the same result, or with the error that
the user is to see.

Run as a module it is that process.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from transmla.export.fresh_process import reason_of
from transmla.process.forks import end_with_parent
from transmla.recipe.data_lists import Part
from transmla.recipe.stages import Distill, Layerwise, Sft

CORES = 4  # of a process of the run: with fewer, what is made beside it is taken from it

# Variables by which a launcher tells a process that it is one of several. The process beside the run is alone, and with
# them would wait for the others.
LAUNCHED = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT))$|(TORCHELASTIC|ACCELERATE|FSDP|OMPI|PMI|MV2)_"
)


@dataclass(frozen=True)
class RowsOf:
    """What the rows of a stage follow from. index: of the stage. data: without `@NAME`. tokenizer: its folder."""

    index: int
    stage: Layerwise | Distill | Sft
    data: Sequence[str | Part]
    tokenizer: Path
    seed: int


class RowsAhead:
    """The process, as the run sees it. It makes rows in the order in which they are asked for, and ends with the
    run."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # without a name: it is gone with this process
        root = str(Path(__file__).resolve().parents[2])  # of the package that runs, not of another one installed
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {name: value for name, value in os.environ.items() if not LAUNCHED.match(name)}
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __spec__.name],  # -P: the current directory is not searched for modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,  # a signal to the run's group is the run's
        )
        self.asked: set[int] = set()
        self._made: set[int] = set()

    def ask(self, wanted: RowsOf) -> None:
        """Have the rows of a stage made."""
        assert self._process.stdin is not None
        self.asked.add(wanted.index)
        try:
            pickle.dump(wanted, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it is dead, and `wait` says why

    def wait(self, index: int) -> str | None:
        """Wait for the rows of a stage, if they were asked for.

        Returns:
            why they are not made, on one line; None: they are, or nobody asked.
        """
        assert self._process.stdout is not None
        while index in self.asked - self._made:
            line = self._process.stdout.readline()
            if not line:
                self.asked.clear()
                self._errors.seek(0)
                return reason_of(self._process.wait(), self._errors.read().decode(errors="replace"))
            self._made.add(int(line))
        return None

    def end(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def main(asked: BinaryIO, made: BinaryIO) -> None:
    """Make the rows of every `RowsOf` on `asked`, until it ends; on `made` a line with the index of each."""
    import torch

    from transmla.data.mixture import load_mixture
    from transmla.data.rows import token_rows
    from transmla.files import temporary_folder
    from transmla.recover.stage import marks_synthetic, trainer_config
    from transmla.sources.tokenizer import load_tokenizer

    while True:
        try:
            wanted: RowsOf = pickle.load(asked)  # noqa: S301 - of the run's own
        except EOFError:
            return
        key, tokenizer = f"recover.{wanted.index}", load_tokenizer(wanted.tokenizer, "model.source")
        data = load_mixture(wanted.data, f"{key}.data", tokenizer, wanted.seed)
        with temporary_folder() as folder:
            config = trainer_config(
                wanted.stage, folder, seed=wanted.seed, device="cpu", dtype=torch.float32, processes=1
            )
            token_rows(data, tokenizer, config, mark_synthetic=marks_synthetic(wanted.stage), key=key)
        made.write(b"%d\n" % wanted.index)
        made.flush()


if __name__ == "__main__":
    end_with_parent()  # nobody waits for the rows of a killed run
    os.nice(10)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    main(sys.stdin.buffer, answers)
