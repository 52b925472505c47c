"""The program's side of the scoring process: start it, ask it, and start it again where it ended."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import subprocess
import sys
import unicodedata
import weakref
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from transmla.errors import RecipeError
from transmla.generate.scoring_process import HEADER, RIGHT, Limits, Task, main

# Of the environment, what finds Python's modules; never a token.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "HOME")

# Of an expression without blanks: brackets that call what stands before them, taken for that wherever they follow
# neither an operator nor the beginning.
CALL = re.compile(r"(?<=[^-+*/%,=<>&|^~:(\[{])\(")


class ScoringProcess:
    """Answers of one task, scored by a process that can change nothing. It starts with the first answer."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, answer: str, entry: dict[str, Any]) -> bool:
        """Whether an answer is right. One that takes too long, or ends the process that scores it, is wrong.

        entry: the problem's, trusted.

        Raises:
            RecipeError: the process cannot be started, or scores wrongly in its sandbox.
        """
        if self.process is None:
            self._start()
        return self._ask(answer, entry, alone=runs_code(answer))

    def _ask(self, answer: str, entry: dict[str, Any], *, alone: bool) -> bool:
        pickled = pickle.dumps((answer, entry))
        requests, verdicts = self._pipes()
        verdict = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                requests.write(HEADER.pack(alone, len(pickled)) + pickled)
                requests.flush()
                verdict = verdicts.read(1)
        finally:
            if not verdict:  # the server ended, or somebody interrupted: the next verdict would be another answer's
                self.close()
        return verdict == RIGHT

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        package = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = [sys.executable, "-P", "-c", f"from {main.__module__} import main; main()"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, cwd="/", env=environment, start_new_session=True
        )
        self._finalizer = weakref.finalize(self, _stop, self.process)
        requests, verdicts = self._pipes()
        pickle.dump(self.task, requests)
        requests.flush()
        expected = verdicts.read(1)
        for alone in (False, True):  # a sandbox that takes too much would make every answer wrong without a word
            if not expected or self._ask(*self.task.example, alone=alone) != (expected == RIGHT):
                self._fail()

    def _fail(self) -> None:
        assert self.process is not None and self.process.stderr is not None
        self.process.kill()
        reason = (self.process.stderr.read().decode(errors="replace").strip().splitlines() or ["no output"])[-1]
        self.close()
        raise RecipeError("problems", f"the process that scores answers does not work here: {reason}; mend that first")

    def _pipes(self) -> tuple[BinaryIO, BinaryIO]:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout  # type: ignore[return-value]  # typed as IO[bytes]

    def close(self) -> None:
        """End the process; the next answer starts another."""
        if self.process is not None:
            self._finalizer()
            self.process = None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server: it ends by itself when nobody can ask any more."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # what was not sent any more
            pipe.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def runs_code(answer: str) -> bool:
    """Whether a text, evaluated as Python, might run code that is not the scorer's, and so change how the next one is
    scored. Without a call, a loop and an assignment an expression cannot."""
    text = unicodedata.normalize("NFKC", answer).replace(" ", "").replace("\t", "")
    return "for" in text or ":=" in text or CALL.search(text) is not None  # a loop's target may be an attribute


@cache
def mathematics() -> ScoringProcess:
    """The process that compares mathematical expressions, one for the program."""
    return ScoringProcess(Task(None, (r"\frac{1}{2}", {"answer": "0.5"}), Limits()))
