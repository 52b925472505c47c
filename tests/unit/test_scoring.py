"""Answers that a model wrote are scored where they can change nothing, and end."""

import os
import struct
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from transmla.errors import RecipeError
from transmla.generate.checkers import MathChecker, final_answer
from transmla.generate.problem_checks import check_problems
from transmla.generate.problems import load_problems
from transmla.generate.sandbox import ALLOW as ALLOW_CALL
from transmla.generate.sandbox import ALLOWED, COMMANDS, DENY, KILL, MACHINES, OPENING, filter_program
from transmla.generate.scoring import ScoringProcess, runs_code
from transmla.generate.scoring_process import Limits, Task
from transmla.recipe.writing import Problems

# Generators of reasoning-gym that evaluate the answer which they score.
EVALUATE = (
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)
QUICK = Limits(cpu=0.5, wall=2.0)
HOSTILE = {
    "a program": "__import__('os').system('touch FILE')",
    "a file": "open('FILE', 'w')",
    "a file in a list": "[open('FILE', 'w').write('x')]",
    "a class": "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', 'FILE'])",
    "a C library": "__import__('ctypes').CDLL(None).system(b'touch FILE')",
    "a connection": "__import__('socket').create_connection(('127.0.0.1', 9), 1)",
    "another process": "__import__('os').fork()",
    "the parent": "__import__('os').kill(__import__('os').getppid(), 9)",
    "the end": "__import__('os')._exit(0)",
    "a verdict": "[__import__('os').write(f, b'r' * 16) for f in range(9)]",
    "an exit": "exit()",
    "a tower": "9**9**9",
    "a long list": "[0]*10**10",
    "a loop": "sum(1 for _ in iter(int, 1))",
    "a pause": "__import__('time').sleep(1000)",
    "brackets": "[" * 100_000,
    "nested brackets": "(" * 100_000 + "1" + ")" * 100_000,
    "objects": '{"a":' * 100_000,
    "a long text": "1 " * 200_000,
    "digits": "9" * 200_000,
    "letters": "\u202e\ud7ff\U0001f4a9 ①² ｅｖａｌ（1） \udcff",
    "zeros": "\0\0",
    "nothing": "",
}


@cache
def every_evaluator() -> tuple[ScoringProcess, dict[str, dict]]:
    """One process for all generators that evaluate, and an entry of each, by name."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    arguments = {"size": 60, "seed": 5, "datasets": [DatasetSpec(name, 1.0, {}) for name in EVALUATE]}
    dataset = reasoning_gym.create_dataset("composite", **arguments)
    entries = {entry["metadata"]["source_dataset"]: entry for entry in dataset}
    example = entries["countdown"]
    return ScoringProcess(Task(("composite", arguments), (example["answer"], example), QUICK)), entries


@pytest.mark.parametrize("generator", EVALUATE)
def test_generators_that_evaluate(generator: str, tmp_path: Path) -> None:
    """What runs code creates no file and is wrong; right answers are right, before and after."""
    process, entries = every_evaluator()
    entry, file = entries[generator], tmp_path / "file"
    assert process(entry["answer"], entry)
    for kind in ("a program", "a file", "a file in a list", "a class"):
        assert not process(HOSTILE[kind].replace("FILE", str(file)), entry)
    assert not process("9**9**9" if generator != "string_insertion" else "", entry)
    assert process(entry["answer"], entry)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("generator", ["countdown", "binary_matrix"])  # by sympy and by eval
def test_hostile_answers(generator: str, kind: str, tmp_path: Path) -> None:
    process, entries = every_evaluator()
    started = time.monotonic()
    assert not process(HOSTILE[kind].replace("FILE", str(tmp_path / "file")), entries[generator])
    assert time.monotonic() - started < 10
    assert not list(tmp_path.iterdir())
    assert process(entries[generator]["answer"], entries[generator])


def test_an_answer_cannot_change_how_the_next_is_scored() -> None:
    process, entries = every_evaluator()
    entry = entries["countdown"]
    process("[0 for __import__('builtins').abs in [lambda x: 0]]", entry)
    assert not process("1", entry) and process(entry["answer"], entry)


@pytest.mark.parametrize(
    ("answer", "runs"),
    [
        ("(1 + 2)*3", False),
        ("[[1, (2)], [3, 4]]", False),
        ("  (7)", False),
        ("", False),
        ("f(1)", True),
        ("f (1)", True),
        ("f\\\n(1)", True),
        ("(f)(1)", True),
        ("'a'.join", False),
        ("ｅｖａｌ（1）", True),
        ("[0 for a.b in [1]]", True),
        ("[a := 1]", True),
    ],
)
def test_answers_that_could_run_code(answer: str, runs: bool) -> None:
    assert runs_code(answer) == runs


def test_a_checker_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `write` and `evaluate.solve` use."""
    monkeypatch.setattr("transmla.generate.checkers.Limits", lambda: QUICK, raising=False)
    found = load_problems(Problems(generator="countdown", size=2), "k")
    entry = found.problems[0].entry
    assert not found.checker(f"open('{tmp_path / 'file'}', 'w')", entry)
    assert not list(tmp_path.iterdir())
    assert found.checker(entry["answer"], entry)


def test_nan_is_no_answer() -> None:
    """complex_arithmetic scores by distance, and no distance to it is above a threshold."""
    found = load_problems(Problems(generator="complex_arithmetic", size=1), "k")
    entry = found.problems[0].entry
    assert not found.checker("nan", entry) and not found.checker("nan+nanj", entry)
    assert found.checker(entry["answer"], entry)


def test_mathematics_ends() -> None:
    """math-verify's own time limit is an alarm, which some of sympy's loops never let through."""
    started = time.monotonic()
    assert not MathChecker()(r"9^{9^{9^{9}}}", {"answer": "3"})
    assert MathChecker()(r"\frac{2}{4}", {"answer": "0.5"})
    assert time.monotonic() - started < 60


def test_a_process_that_cannot_start_says_why() -> None:
    task = Task(("no_such_generator", {}), ("1", {"answer": "1"}), QUICK)
    with pytest.raises(RecipeError, match="the process that scores answers does not work .*no_such_generator"):
        ScoringProcess(task)("1", {"answer": "1"})


def test_a_machine_without_filters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transmla.generate.problem_checks.is_supported", lambda: False, raising=False)
    with pytest.raises(RecipeError, match="k: .*seccomp"):
        check_problems(Problems(generator="leg_counting"), "k", skip=0, limit=None, online=False)


SANDBOXED = """
import ctypes, os, signal, socket, subprocess, sys
from transmla.generate.sandbox import Sandbox
folder = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
mine = os.open(folder, os.O_RDONLY)
Sandbox().enter()
attempts = {
    "open": lambda: open(f"{folder}/a", "w"),
    "append": lambda: open(f"{folder}/there", "a"),
    "create": lambda: os.open(f"{folder}/a", os.O_CREAT),
    "unnamed": lambda: os.open(folder, os.O_TMPFILE | os.O_RDONLY),
    "mkdir": lambda: os.mkdir(f"{folder}/b"),
    "remove": lambda: os.unlink(f"{folder}/there"),
    "rename": lambda: os.rename(f"{folder}/there", f"{folder}/c"),
    "link": lambda: os.symlink("x", f"{folder}/d"),
    "truncate": lambda: os.truncate(f"{folder}/there", 0),
    "chmod": lambda: os.chmod(f"{folder}/there", 0),
    "chdir": lambda: os.chdir(folder),
    "memory file": lambda: os.memfd_create("x"),
    "socket": lambda: socket.socket(),
    "pair": lambda: socket.socketpair(),
    "fork": lambda: os.fork(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "program": lambda: subprocess.run(["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
    "trace": lambda: (_ for _ in ()).throw(OSError(ctypes.get_errno(), "")) if libc.ptrace(0, 0, 0, 0) < 0 else None,
    "owner": lambda: os.setuid(0),
    "mount": lambda: (_ for _ in ()).throw(OSError(ctypes.get_errno(), "")) if libc.unshare(0x20000000) < 0 else None,
}
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError as error:
        assert error.errno == 1, (name, error)
    except RuntimeError as error:
        assert "thread" in str(error), (name, error)
    else:
        raise AssertionError(name)
print(open(f"{folder}/there").read())
"""


def test_the_sandbox(tmp_path: Path) -> None:
    """What a process in it can still do is to read; nothing else of the list, even as root."""
    (tmp_path / "there").write_text("read")
    command = [sys.executable, "-c", SANDBOXED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "read" and [file.name for file in tmp_path.iterdir()] == ["there"]


def answer_of(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the kernel would answer a system call: the filter, interpreted."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    code = [struct.unpack_from("<HBBI", program, place) for place in range(0, len(program), 8)]
    held, place = 0, 0
    while True:
        kind, yes, no, value = code[place]
        if kind == 0x20:
            (held,) = struct.unpack_from("<I", data, value)
        elif kind == 0x06:
            return value
        else:
            found = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[kind]
            place += yes if found else no
        place += 1


@pytest.mark.parametrize("machine", MACHINES)
def test_filters_of_both_machines(machine: str) -> None:
    program, (arch, column) = filter_program(machine), MACHINES[machine]
    forbidden = {"x86_64": (41, 56, 57, 58, 59, 62, 85, 87, 101, 157, 319, 322, 425, 435, 437)}  # socket, clone, ...
    forbidden["aarch64"] = (198, 220, 221, 129, 35, 38, 117, 167, 279, 281, 425, 435, 437)
    for number in forbidden[machine]:
        assert answer_of(program, arch, number) == DENY
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            assert answer_of(program, arch, number) == ALLOW_CALL
    opening = OPENING["openat"][0][column]
    assert answer_of(program, arch, opening, 0, 0, os.O_RDONLY | os.O_CLOEXEC) == ALLOW_CALL
    for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_TMPFILE):
        assert answer_of(program, arch, opening, 0, 0, flag) == DENY
    ioctl = COMMANDS["ioctl"][0][column]
    assert answer_of(program, arch, ioctl, 0, 0x5401) == ALLOW_CALL
    assert answer_of(program, arch, ioctl, 0, 0x5412) == DENY  # would type into a terminal
    assert answer_of(program, arch ^ 1, 0) == KILL
    if machine == "x86_64":
        assert answer_of(program, arch, 0x40000000 + 1) == DENY


@pytest.mark.parametrize(
    "reply",
    [
        r"\boxed{" * 5000,
        "<answer>" * 5000,
        "answer:" + "*" * 5000 + "\n",
        "answer is" + " " * 3000 + "\n",
        "#### " * 5000 + "\n",
        "answer: " * 5000,
    ],
)
def test_reading_an_answer_takes_linear_time(reply: str) -> None:
    """A model that repeats itself must not hold up the run: `\\boxed{` took the square of its length."""
    started = time.monotonic()
    final_answer(reply)
    assert time.monotonic() - started < 1
