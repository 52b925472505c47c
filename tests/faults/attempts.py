"""One attempt at the recipe, on one process or two, in processes whose end can be waited for and whose lines are read.

`Cold` is the command as a user gives it, with torchrun for two. `Warm` forks from a server that has imported what is
heavy, which saves nine tenths of the time until work goes on; its two processes have no launcher.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["recipe=faults.yaml", "device=cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
PROGRESS = re.compile(r"\[(write|convert|recover|export|evaluate)|\{'loss'")  # all processes are there by then
END = 30.0  # seconds within which a killed run must be gone


def places(folder: Path) -> dict[str, str]:
    """The environment of everything that is started: nothing outside the folder is written."""
    own = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "TRANSMLA_CACHE": str(folder / "cache")}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


class Attempt:
    """What both kinds have. printed: the file of both outputs. targets: process ids that may be killed, by name."""

    def __init__(self, folder: Path) -> None:
        self.begun, self.working = time.monotonic(), 0.0
        self.lines: list[str] = []
        self.printed = (folder / "printed").open("w+")
        self.read = (folder / "printed").open()
        self.rest = ""

    def code(self) -> int | None:
        raise NotImplementedError

    def members(self) -> dict[str, int]:
        raise NotImplementedError

    def reaches(self, lines: int) -> bool:
        """Wait until so many lines of progress are printed; False: it ended before."""
        while len(self.lines) < lines and self.code() is None:
            *new, self.rest = (self.rest + self.read.read()).split("\n")
            self.lines += [line for line in new if PROGRESS.match(line)]
            if not self.working and any(line.endswith("] ...") for line in new):
                self.working = time.monotonic()
            time.sleep(0.001)
        return self.code() is None

    def kill(self, rng: random.Random) -> str:
        """Kill one of its processes, or all of them; which."""
        members = {name: pid for name, pid in sorted(self.members().items()) if not name.startswith("child")}
        chosen = rng.choice([*members, "all"]) if len(members) > 1 else "all"
        for name, pid in members.items():
            if chosen in (name, "all"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return chosen

    def gone(self) -> float:
        """Seconds until none of its processes is left."""
        begun = time.monotonic()
        while left := self.members():
            assert time.monotonic() - begun < END, left
            time.sleep(0.02)
        while self.code() is None:
            time.sleep(0.01)
        return time.monotonic() - begun

    def finish(self) -> float:
        """Seconds that it took in all."""
        self.reaches(10**6)
        seconds = time.monotonic() - self.begun
        assert self.code() == 0, Path(self.printed.name).read_text()[-3000:]
        self.gone()
        return seconds


class Cold(Attempt):
    """The command; its processes carry a mark in their environment."""

    def __init__(self, folder: Path, processes: int) -> None:
        super().__init__(folder)
        self.mark = f"TRANSMLA_TEST_MARK={folder.name}-{time.monotonic_ns()}"
        self.process = subprocess.Popen(
            [sys.executable, *(TORCHRUN if processes > 1 else []), str(ROOT / "recover.py"), *WORDS],
            cwd=folder,
            env=os.environ | places(folder) | dict([self.mark.split("=")]),
            stdout=self.printed,
            stderr=subprocess.STDOUT,
        )

    def code(self) -> int | None:
        return self.process.poll()

    def members(self) -> dict[str, int]:
        """Its processes that live: `launcher`, the numbers of those that train, children of these."""
        found = {}
        for place in Path("/proc").iterdir():
            try:
                facts = (place / "environ").read_bytes().decode(errors="replace").split("\0")
                state, parent = (place / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            if self.mark in facts and state not in (b"Z", b"X"):
                number = next((fact[5:] for fact in facts if fact.startswith("RANK=")), "launcher")
                own = int(parent) == (os.getpid() if number == "launcher" else self.process.pid)
                found[number if own else f"child {place.name}"] = int(place.name)
        return found


SERVER = multiprocessing.get_context("forkserver")


def serve(folder: Path) -> None:
    """Name what the server imports; it starts with the first attempt and keeps this environment."""
    heavy = ["transmla.cli", "transmla.plan.checks", "transmla.run.pipeline", "transmla.bench.stage_rates"]
    SERVER.set_forkserver_preload([*heavy, "transformers.models.llama.modeling_llama", "trl.trainer.sft_trainer"])
    os.environ.update(places(folder))


def run_forked(folder: Path, environment: dict[str, str], printed: str) -> None:
    """What a process of a warm attempt does."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from transmla.cli import main

    code = main(["recover", *WORDS])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


class Warm(Attempt):
    """Processes of the fork server, each in a session of its own with its children."""

    def __init__(self, folder: Path, processes: int) -> None:
        super().__init__(folder)
        with socket.create_server(("localhost", 0)) as free:
            port = str(free.getsockname()[1])
        shared = places(folder) | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        self.processes = []
        for number in range(processes):
            own = shared | {"RANK": str(number), "LOCAL_RANK": str(number)} if processes > 1 else places(folder)
            process = SERVER.Process(target=run_forked, args=(folder, own, self.printed.name), daemon=True)
            process.start()
            self.processes.append(process)

    def code(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def members(self) -> dict[str, int]:
        """Its processes that live: the numbers of those that train, children of these."""
        own = {process.pid: str(number) for number, process in enumerate(self.processes)}
        found = {}
        for place in Path("/proc").iterdir():
            try:
                state, _, _, session = (place / "stat").read_bytes().rpartition(b")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if int(session) in own and state not in (b"Z", b"X"):
                pid = int(place.name)
                found[own.get(pid, f"child {pid}")] = pid
        return found
