"""Python's garbage collector waits while modules are imported, once in a process, and is back afterwards."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ONCE = """
import gc
from transmla.process.collector import uncollected
states = []
for _ in range(2):
    try:
        with uncollected():
            states.append(gc.isenabled())
            raise ValueError
    except ValueError:
        states += [gc.isenabled(), gc.get_freeze_count()]
    made = [[] for _ in range(100)]
print(states[0], states[1], states[2] > 1000, states[3], states[4], states[5] <= states[2])
gc.disable()
with uncollected():
    pass
print(gc.isenabled())
"""
REFUSED = """
import gc, sys
from transmla.cli import main
code = main(["recover", "recipe=debug", "convert.kv_lora_rank=1000", "output_dir=out"])
print(code, gc.isenabled(), gc.get_freeze_count() > 50_000)
"""


def said(script: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_the_first_time_alone(tmp_path: Path) -> None:
    assert said(ONCE, tmp_path) == ["False True True True True True", "False"]


def test_a_refused_command(tmp_path: Path) -> None:
    assert said(REFUSED, tmp_path)[-1] == "2 True True"
