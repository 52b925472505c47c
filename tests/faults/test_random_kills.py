"""A run that is killed at moments drawn by a seed, over the whole path, ends with the bytes of one that was not.

For another number of kills or another seed:

    TRANSMLA_KILLS=100 TRANSMLA_KILLS_OF_TWO=40 TRANSMLA_KILL_SEED=7 pytest -m faults -n0 -s -k killed_at_random
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.attempts import Cold, Warm, serve
from tests.faults.recipe import contents, save

pytestmark = pytest.mark.faults
KILLS = {1: int(os.environ.get("TRANSMLA_KILLS", "8")), 2: int(os.environ.get("TRANSMLA_KILLS_OF_TWO", "3"))}
SEED = int(os.environ.get("TRANSMLA_KILL_SEED", "0"))
COLD = 0.15  # of the attempts are the command itself; half of these are killed before they print anything
LINES = 24  # of an attempt's progress, at most, before it is killed; the whole path prints about 80
PAUSE = 0.3  # seconds, at most, between a line and the kill: a step takes less


def prepare(folder: Path) -> Path:
    save(folder, recorded=False)  # `recover` alone makes everything
    (folder / "tmp").mkdir()
    return folder


def listing(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random(processes: int, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    serve(tmp_path)
    rng, wanted = random.Random(SEED), KILLS[processes]
    straight = prepare(tmp_path / "straight")
    run = Cold(straight, processes)
    unbroken = run.finish()
    starting = run.working - run.begun
    where: Counter[str] = Counter()
    ends, costs = [0.0], [starting]
    runs = 0
    while sum(where.values()) < wanted:
        folder, runs, done = prepare(tmp_path / f"run{runs}"), runs + 1, False
        while not done:
            cold = rng.random() < COLD
            lines, share, early = rng.randint(1, LINES), rng.random(), rng.random() < 0.5
            attempt = (Cold if cold else Warm)(folder, processes)
            if sum(where.values()) < wanted and attempt.reaches(0 if cold and early else lines):
                time.sleep(share * (starting if cold and early else PAUSE))
                if attempt.code() is None:
                    at = next((line for line in reversed(attempt.lines) if line.startswith("[")), "[starting]")
                    where[f"{at[1:].partition(']')[0]}, {attempt.kill(rng)}{', cold' if cold else ''}"] += 1
                    ends.append(attempt.gone())
                    if cold and attempt.working:
                        costs.append(attempt.working - attempt.begun)
                    continue
            attempt.finish()
            done = True
        assert contents(folder / "out") == contents(straight / "out")
        assert listing(folder / "out") == listing(straight / "out")
        assert not list((folder / "cache").glob(".partial*"))
    with capsys.disabled():
        print(
            f"\n{processes} process(es), seed {SEED}: {sum(where.values())} kills in {runs} runs, which all finished "
            f"with the same bytes. Unbroken {unbroken:.1f} s; work goes on {statistics.median(costs):.1f} s after a "
            f"start; the last process is gone {statistics.median(ends):.2f} s after a kill, at most {max(ends):.2f} s."
        )
        print("\n".join(f"  {count:3} {place}" for place, count in sorted(where.items())))
