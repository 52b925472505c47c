"""Signals, the launcher's end, and the lock of an output directory, in small processes without any model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transmla.errors import RecipeError
from transmla.process.machine_faults import fault_of
from transmla.process.output_lock import LOCK, only_run

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import ctypes, os, signal, sys, time
from pathlib import Path
from transmla.files import scratch_folder
from transmla.process.command import guarded
from transmla.process.stopping import end_stopped, request
from transmla.process.watch import training
def work():
"""
WORK = {
    "python": """
    with scratch_folder(Path('.partial-x')):
        print(os.getpid(), flush=True)
        time.sleep(60)""",
    "finalizer": """
    class Swallows:
        def __del__(self):
            print(os.getpid(), flush=True)
            time.sleep(60)
    Swallows()""",
    "library": """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # the thread gets it, and this one never returns
    print(os.getpid(), flush=True)
    ctypes.CDLL(None).sleep(60)""",
    "training": """
    with training():
        print(os.getpid(), flush=True)
        while not request().number:
            time.sleep(0.01)
        time.sleep(20 if 'long' in sys.argv else 0.3)
        end_stopped(' after step 3')""",
    "fork": """
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)""",
}
WORK["worker"] = """
    worker = os.fork()
    if not worker:
        print(os.getpid(), flush=True)
        time.sleep(60)
    with training():
        while not request().number:
            time.sleep(0.01)
        os.kill(worker, signal.SIGTERM)
        os._exit(7 if os.waitpid(worker, 0) == (worker, 0) else 8)"""
END = "\n    return 0\nsys.exit(guarded(work))"


class Process:
    """A piece of work that is under way."""

    def __init__(self, work: str, folder: Path, *words: str, **options: object) -> None:
        environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN + WORK[work] + END, *words],
            cwd=folder,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        assert self.process.stdout is not None
        self.pid = int(self.process.stdout.readline())

    def end(self) -> tuple[int, str, float]:
        """Exit code, what it printed, and the seconds until then."""
        begun = time.monotonic()
        printed = self.process.communicate(timeout=30)[1]
        return self.process.returncode, printed, time.monotonic() - begun


@pytest.mark.parametrize("work", ["python", "finalizer", "training"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_one_line_and_a_code(number: signal.Signals, work: str, tmp_path) -> None:
    process = Process(work, tmp_path)
    process.process.send_signal(number)
    code, printed, seconds = process.end()
    where = " after step 3" if work == "training" else ""
    assert (code, printed) == (128 + number, f"stopped by {number.name}{where}; the same command goes on\n")
    assert seconds < 5 and not list(tmp_path.iterdir())


def test_a_library_that_does_not_return_is_waited_for_shortly(tmp_path) -> None:
    process = Process("library", tmp_path)
    time.sleep(1.0)  # until it is in the library
    process.process.send_signal(signal.SIGTERM)
    code, printed, seconds = process.end()
    assert code == 143 and printed.startswith("stopped by SIGTERM") and 2 < seconds < 10


def test_the_second_interrupt_ends_a_long_step(tmp_path) -> None:
    process = Process("training", tmp_path, "long")
    process.process.send_signal(signal.SIGINT)
    process.process.send_signal(signal.SIGINT)  # as `timeout` does: twice at once is once
    time.sleep(1.5)
    assert process.process.poll() is None
    process.process.send_signal(signal.SIGINT)
    code, printed, seconds = process.end()
    assert code == 130 and printed.startswith("ended by a second SIGINT") and seconds < 5


def test_what_was_ignored_stays_ignored(tmp_path) -> None:
    """As SIGHUP is under nohup."""
    process = Process("python", tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.process.poll() is None
    process.process.send_signal(signal.SIGTERM)
    assert process.end()[0] == 143


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_dies_with_its_run(number: signal.Signals, tmp_path) -> None:
    process = Process("fork", tmp_path)
    assert process.pid != process.process.pid
    process.process.send_signal(number)
    process.process.wait()
    assert gone(process.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_worker_heeds_its_run_alone(number: signal.Signals, tmp_path) -> None:
    """systemd and Slurm send a signal to every process; a step whose worker ended of it could not be saved."""
    process = Process("worker", tmp_path)
    os.kill(process.pid, number)
    assert not gone(process.pid, 1.0)
    process.process.send_signal(signal.SIGUSR1)  # has it send SIGTERM to the worker
    code, printed, _ = process.end()
    assert (code, printed) == (7, "") and gone(process.pid)


@pytest.mark.parametrize(("name", "ends"), [("accelerate", True), ("shell", False)])
def test_a_run_ends_with_its_launcher_and_not_with_its_shell(name: str, ends: bool, tmp_path) -> None:
    script = BEGIN + WORK["python"] + END
    launching = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {script!r}]).wait()\n"
    file = tmp_path / name
    file.write_text(launching)
    launcher = subprocess.Popen(
        [sys.executable, str(file)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    time.sleep(0.3)
    launcher.kill()
    launcher.wait()
    try:
        assert gone(pid, 10.0 if ends else 2.0) == ends
    finally:
        if not ends:
            os.kill(pid, signal.SIGKILL)


def test_one_run_at_a_time(tmp_path) -> None:
    """The folder is made; who has it is named; a killed run leaves nothing that is in the way."""
    folder = tmp_path / "new" / "out"
    script = (
        "import sys, time; from pathlib import Path; from transmla.process.output_lock import only_run\n"
        "with only_run(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "in\n"
    refused = rf"^output_dir: .* in use by a run, process {first.pid} on \S+; "
    with pytest.raises(RecipeError, match=refused), only_run(folder):
        pass
    first.kill()
    first.wait()
    for beside in (False, False, True):
        with only_run(folder, beside=beside):
            assert (folder / LOCK).is_file() != beside
    assert not list(folder.iterdir()) and [path.name for path in folder.parent.iterdir()] == ["out"]


def test_other_processes_of_a_run_share_its_lock(tmp_path, monkeypatch) -> None:
    with only_run(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with only_run(tmp_path):
            pass
        monkeypatch.delenv("RANK")


def raised_from(cause: Exception, *, explicitly: bool) -> Exception:
    """A library's own error that came of another one."""
    try:
        try:
            raise cause
        except OSError as error:
            if explicitly:
                raise RuntimeError("generation failed") from error
            raise RuntimeError("generation failed")  # noqa: B904  # as many libraries do
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory: the process could not"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out of memory"),
        (OSError(28, "No space left on device", "x"), "the disk refuses: .*; make room"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "the disk refuses"),
        (FileNotFoundError(2, "No such file or directory", "a/model.safetensors"), "a file is gone .*a/model.safet"),
        (raised_from(OSError(28, "No space left on device"), explicitly=True), "the disk refuses"),
        (raised_from(OSError(28, "No space left on device"), explicitly=False), "the disk refuses"),
        (raised_from(FileNotFoundError(2, "No such file", "a/x"), explicitly=True), "a file is gone"),
        (raised_from(FileNotFoundError(2, "No such file", "a/x"), explicitly=False), None),
        (FileNotFoundError(2, "No such file or directory", "gcc"), None),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a process that prepares data"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory"),
        (RuntimeError("shapes differ"), None),
        (ZeroDivisionError(), None),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(error: Exception, words: str | None) -> None:
    found = fault_of(error)
    assert found is None if words is None else found is not None and re.match(words, found)


@pytest.mark.parametrize("words", [["--help"], ["verify", "recipe=debug", "dry_run=true"]], ids=["help", "plan"])
def test_a_pipe_that_nobody_reads_is_one_line(words) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from transmla.cli import main; sys.exit(main())", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: nobody reads standard output")
