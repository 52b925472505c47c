"""The process that scores answers which a model wrote. Some scorers evaluate such text as Python.

    program  --requests-->  server  --request-->  worker
             <--verdicts--          <--verdict--

The server evaluates nothing. It forks workers, which lose every system call that could change anything (`sandbox.py`)
before they see an answer; it ends a worker that takes too long and forks another. A worker goes on from answer to
answer, except that an answer which could run code gets one of its own: it might change how the next is scored.

`main` is the server, which `scoring.py` starts. The program's side of the pipes is trusted, so it sends
pickles: a generator's entries hold tuples, which JSON would lose. Of a worker the server reads bytes alone.
"""

from __future__ import annotations

import gc
import os
import pickle
import secrets
import select
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from transmla.generate.sandbox import Sandbox, limit_resources

Score = Callable[[str, dict[str, Any]], bool]

RIGHT, WRONG, ENDED = b"r", b"w", b"e"  # ENDED: the worker had to be ended, or ended itself
SECRET = 16  # bytes that a worker repeats for a right answer; text that ends the process early does not know them
HEADER = struct.Struct("!?I")  # of a request: whether it needs a worker of its own; bytes of its pickle


@dataclass(frozen=True)
class Limits:
    """What scoring one answer may take. cpu, wall: seconds; the wall clock is for an answer that sleeps. memory: bytes
    beyond what the libraries need."""

    cpu: float = 5.0
    wall: float = 30.0
    memory: int = 2**30


@dataclass(frozen=True)
class Task:
    """What is scored. generator: (name, arguments) of a reasoning-gym dataset; None: mathematics. example: an answer
    and its entry, trusted; scoring it loads what the libraries load late."""

    generator: tuple[str, dict[str, Any]] | None
    example: tuple[str, dict[str, Any]]
    limits: Limits


def score_mathematics(answer: str, entry: dict[str, Any]) -> bool:
    """Whether an expression equals the entry's `answer`."""
    from math_verify import parse, verify

    right, given = (parse(f"\\boxed{{{text}}}") for text in (entry["answer"], answer))
    return bool(right and given and verify(right, given))


def scorer(task: Task) -> Score:
    """The function that scores the answers of a task."""
    if task.generator is None:
        return score_mathematics
    import reasoning_gym

    name, arguments = task.generator
    dataset = reasoning_gym.create_dataset(name, **arguments)
    return lambda answer, entry: bool(dataset.score_answer(answer, entry) >= 1.0)


class Worker:
    """A forked process in the sandbox, that scores one answer after another."""

    def __init__(self, score: Score, sandbox: Sandbox) -> None:
        requests, self.requests = os.pipe()
        self.verdicts, verdicts = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            _work(score, sandbox, requests, verdicts)
        os.close(requests)
        os.close(verdicts)

    def __call__(self, pickled: bytes, limits: Limits) -> bytes:
        """RIGHT, WRONG or ENDED for one answer and its entry."""
        secret = secrets.token_bytes(SECRET)
        before, deadline = self._cpu(), time.monotonic() + limits.wall
        try:
            _send(self.requests, secret + struct.pack("!I", len(pickled)) + pickled)
        except BrokenPipeError:
            return ENDED
        wait = limits.cpu
        while wait > 0:
            if select.select([self.verdicts], [], [], wait)[0]:
                verdict = os.read(self.verdicts, SECRET)
                return RIGHT if verdict == secret else WRONG if verdict == bytes(SECRET) else ENDED
            wait = min(limits.cpu - (self._cpu() - before), deadline - time.monotonic())
        return ENDED

    def _cpu(self) -> float:
        """Seconds of CPU time so far; from the kernel's clock of that process, whose number is made of its id."""
        return time.clock_gettime((~self.process << 3) | 2)

    def end(self) -> None:
        """End the process."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.requests)
        os.close(self.verdicts)


def _work(score: Score, sandbox: Sandbox, requests: int, verdicts: int) -> None:
    """What a worker does until it is ended; never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)
        first, second = sorted((requests, verdicts))
        for start, end in ((3, first), (first + 1, second), (second + 1, os.sysconf("SC_OPEN_MAX"))):
            os.closerange(start, end)  # the server's side of all pipes among them
        sandbox.enter()
        source = os.fdopen(requests, "rb")
        while True:
            secret = source.read(SECRET)
            (size,) = struct.unpack("!I", source.read(4))
            answer, entry = pickle.loads(source.read(size))
            os.write(verdicts, secret if _score_safely(score, answer, entry) else bytes(SECRET))
    finally:
        os._exit(1)


def _score_safely(score: Score, answer: str, entry: dict[str, Any]) -> bool:
    """Whether an answer is right; one that raises is not."""
    try:
        return score(answer, entry)
    except BaseException:  # the text may raise anything, SystemExit too
        return False


def _send(descriptor: int, content: bytes) -> None:
    """Write all of it."""
    with memoryview(content) as rest:
        sent = 0
        while sent < len(content):
            sent += os.write(descriptor, rest[sent:])


def serve(requests: BinaryIO, verdicts: BinaryIO) -> None:
    """Answer requests until there are no more. The first verdict is the example's, scored here."""
    task: Task = pickle.load(requests)
    score, sandbox = scorer(task), Sandbox()
    sandbox.try_out()
    verdicts.write(RIGHT if _score_safely(score, *task.example) else WRONG)
    verdicts.flush()
    limit_resources(task.limits.memory)
    gc.collect()
    gc.freeze()  # a worker that collects garbage would copy every page
    shared: Worker | None = None
    while header := requests.read(HEADER.size):
        alone, size = HEADER.unpack(header)
        pickled = requests.read(size)
        worker = shared if shared is not None and not alone else Worker(score, sandbox)
        verdict = worker(pickled, task.limits)
        if alone or verdict == ENDED:
            worker.end()
        shared = shared if alone else None if verdict == ENDED else worker
        verdicts.write(verdict)
        verdicts.flush()
    if shared is not None:
        shared.end()


def main() -> None:
    """Serve on standard input and output, which libraries that print must not reach."""
    requests, verdicts = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    serve(requests, verdicts)
