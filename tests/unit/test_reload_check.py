"""A reload check that fails, or cannot run, says so in one line."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from transmla.errors import RecipeError
from transmla.export import fresh_process
from transmla.export.engine_process import normalised as numpy_normalised
from transmla.export.fresh_process import FreshProcess, normalised
from transmla.export.reload_check import check_reload
from transmla.plan.checks import prepare
from transmla.recipe.compose import load_recipe
from transmla.recipe.schema import Verify
from transmla.run.context import Run
from transmla.run.rows_ahead import CORES

TOKENS = torch.ones(1, 4, dtype=torch.long)


def refused(folder: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        check_reload(folder, TOKENS, torch.zeros(1, 4, 7), Verify(), torch.float32)
    (line,) = str(caught.value).splitlines()
    return line


def test_a_checkpoint_that_does_not_load(tmp_path: Path) -> None:
    line = refused(tmp_path)
    assert line.startswith("export.verify: stock transformers cannot load") and line.endswith("nothing was published")


def test_a_process_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does where memory runs out."""
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    script = tmp_path / "killed.py"
    script.write_text(killed)
    monkeypatch.setattr(fresh_process, "__file__", str(script))
    assert "the process was killed, most likely for want of memory" in refused(tmp_path)
    assert fresh_process.reason_of(-signal.SIGSEGV, "") == "the process ended with SIGSEGV"
    assert fresh_process.reason_of(1, "") == "no output"
    assert fresh_process.reason_of(1, "this is wrong\nthis too\n") == "this too"
    printed = (
        "ValueError: earlier\n\nTraceback (most recent call last):\n  File\n"
        "lib.errors.ValidationError: 1 error\n  it is too long\n    see https://errors\n[W] left behind\n"
    )
    said = "lib.errors.ValidationError: 1 error it is too long see https://errors"
    assert fresh_process.reason_of(1, printed) == said


def test_a_machine_without_the_memory_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(total=2**10)
    machine = SimpleNamespace(virtual_memory=lambda: small, swap_memory=lambda: small)
    monkeypatch.setattr("transmla.plan.export_checks.psutil", machine)
    words = ["device=cpu"]
    with pytest.raises(RecipeError, match="export.verify: the check of the export takes .* GiB of memory"):
        prepare(load_recipe("debug", words))
    prepare(load_recipe("debug", [*words, "dry_run=true"]))  # a plan may be made on another machine


def test_many_words_are_summed_exactly() -> None:
    """log_softmax over the words of a large vocabulary is wrong by more than what two programs differ by."""
    logits = 4.0 * torch.randn(2, 3, 151_936, generator=torch.Generator().manual_seed(0))
    wrong, found = (scores.double().exp().sum(-1) - 1.0 for scores in (logits.log_softmax(-1), normalised(logits)))
    assert wrong.abs().max() > 5e-6 and found.abs().max() < 2e-6
    other = numpy_normalised(logits[0].numpy())
    torch.testing.assert_close(torch.from_numpy(other), normalised(logits)[0], rtol=0, atol=2e-5)


def test_a_process_that_dies_while_it_waits(tmp_path: Path) -> None:
    """Another one takes its place; of a run whose training takes hours."""
    run = Run.__new__(Run)
    run.prepared = SimpleNamespace(device="cuda", export=SimpleNamespace(stock=True))
    run.state, run._fresh = SimpleNamespace(is_main_process=True), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: range(CORES))
        run.start_fresh_process()
        first = run._fresh
        run.start_fresh_process()
        assert first is not None and run._fresh is first
    os.kill(first._process.pid, signal.SIGKILL)
    first._process.wait()
    with run.fresh_process() as found, pytest.raises(RuntimeError, match="stock transformers cannot load"):
        assert found is not first and run._fresh is None
        found.score(tmp_path, TOKENS)
    run._fresh = FreshProcess(stock=True)
    with run.fresh_process() as found:
        assert found.waits and run._fresh is None
    assert not found.waits
    run._fresh = FreshProcess(stock=True)
    last = run._fresh
    run.end_fresh_process()
    assert run._fresh is None and not last.waits


def test_what_was_forked_meanwhile_holds_nothing_up(tmp_path: Path) -> None:
    """As the workers of a data loader are, which have the pipe to the process then."""
    with FreshProcess(stock=True) as fresh:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        try:
            with pytest.raises(RuntimeError, match="stock transformers cannot load"):
                fresh.score(tmp_path, TOKENS)
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the answer came when the child had ended"
        finally:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
