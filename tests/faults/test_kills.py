"""A run that is killed again and again, wherever it writes, ends with the bytes of one that was not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.recipe import STEPS, contents, save

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]
KINDS = ("layerwise", "distill", "distill", "sft")


def targets() -> Iterator[tuple[str, str]]:
    """What has to appear in the output directory for a verb to be killed, in the order in which it does."""
    yield "write", "written/own.parts/000.jsonl"
    yield "write", "written/.partial-own/transmla.json"
    yield "record", "recorded/1/.partial-00000.bin"
    yield "recover", ".partial-converted"
    yield "recover", ".partial-converted/transmla.json"
    for index, (kind, steps) in enumerate(zip(KINDS, STEPS, strict=True)):
        last = index == len(KINDS) - 1
        place, name = ("", "recovered") if last else ("stages/", f"{index}_{kind}")
        yield "recover", f"checkpoints/{index}_{kind}/.partial/checkpoint-8/trained.safetensors"
        yield "recover", f"checkpoints/{index}_{kind}/checkpoint-{steps}"
        yield "recover", f"{place}.partial-{name}/transmla.json"
        yield "recover", f"{place}{name}/transmla.json"
    yield "recover", ".partial-exported/model.safetensors"
    yield "recover", ".partial-exported/tokenizer_config.json"  # the reload check comes next
    yield "recover", "evaluation/.partial-recovered"


class Run:
    """A verb in a process of its own, in a session of its own."""

    def __init__(self, folder: Path, verb: str) -> None:
        script = "import sys; from transmla.cli import main; sys.exit(main())"
        places = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "TRANSMLA_CACHE": str(folder / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, verb, "recipe=faults.yaml", "device=cpu"],
            cwd=folder,
            env=os.environ | places | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def kill_when(self, path: Path) -> bool:
        """Kill it with its children as soon as a path is there; False: it ended before."""
        known = path.stat().st_ino if path.exists() else None  # left by an earlier kill
        while self.process.poll() is None:
            if path.exists() and path.stat().st_ino != known:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.communicate()
                return True
            time.sleep(0.0005)
        return False

    def end(self) -> str:
        printed = self.process.communicate()[0]
        assert self.process.returncode == 0, printed[-3000:]
        return printed


def listing(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    save(folder)
    (folder / "tmp").mkdir()
    for verb in ("write", "record", "recover"):
        Run(folder, verb).end()
    return folder


def test_killed_wherever_it_writes(straight: Path, tmp_path) -> None:
    save(tmp_path)
    (tmp_path / "tmp").mkdir()
    out, killed = tmp_path / "out", 0
    for verb in ("write", "record", "recover"):
        for path in [path for own, path in targets() if own == verb]:
            run = Run(tmp_path, verb)
            killed += run.kill_when(out / path)
            if run.process.returncode not in (0, -signal.SIGKILL):
                run.end()
        Run(tmp_path, verb).end()
    assert killed >= 16  # what lives for less than a millisecond may be missed
    assert contents(out) == contents(straight / "out")
    assert listing(out) == listing(straight / "out")
    assert not [path for path in (tmp_path / "tmp").iterdir() if "torchinductor" not in path.name]
    assert not list((tmp_path / "cache").glob(".partial*"))
