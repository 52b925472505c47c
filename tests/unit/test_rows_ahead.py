"""Rows of coming stages that a process makes beside the run: the stage finds them, and does without them."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import pytest

from tests.conftest import InThisProcess
from transmla.cli import main
from transmla.data.labelled import Labeller
from transmla.recipe.compose import load_recipe
from transmla.run.context import Run
from transmla.run.rows_ahead import RowsAhead, RowsOf
from transmla.sources.fetch import fetch

WRITE = "write=[{name: own, kind: text, tokens: 300, max_new_tokens: 40, batch_size: 4}]"
RECIPE = ["recover", "recipe=debug", "device=cpu", WRITE]
SMALL = ["recover.1.cross_entropy=0.1", "recover.0.tokens=2048", "recover.1.tokens=1024", "evaluate.tokens=256"]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with the process that a GPU and spare cores would give it."""
    ahead = cached_property(lambda run: RowsAhead())
    ahead.__set_name__(Run, "rows_ahead")
    monkeypatch.setattr(Run, "rows_ahead", ahead)
    monkeypatch.setattr(Run, "spares_cores", True)


@pytest.fixture
def rows(tmp_path) -> Path:
    """Text that no other test has left in Datasets' cache."""
    file = tmp_path / "rows.jsonl"
    lines = [f'{{"text": "sentence {number} of {tmp_path}, about the sea"}}' for number in range(200)]
    file.write_text("\n".join(lines))
    return file


def command(rows: Path, out: Path) -> list[str]:
    data = [f"recover.0.data=[{rows}]", f"recover.1.data=[{rows},'@own']"]
    return [*RECIPE, *SMALL, *data, f"output_dir={out}"]


def recovered(out: Path) -> bytes:
    return (out / "recovered" / "model.safetensors").read_bytes()


def test_stages_find_their_rows(beside, quick, rows, tmp_path, monkeypatch, capfd) -> None:
    called: list[str] = []
    label = Labeller.__call__

    def counted(self, *batch):
        called.append(self.key)
        return label(self, *batch)

    monkeypatch.setattr(Labeller, "__call__", counted)
    assert main(command(rows, tmp_path / "ahead")) == 0
    assert not called and "could not be made ahead" not in capfd.readouterr().out
    monkeypatch.undo()
    rows.write_text(rows.read_text() + "\n")  # another state of the file: its rows are made anew
    assert main(command(rows, tmp_path / "alone")) == 0
    assert recovered(tmp_path / "ahead") == recovered(tmp_path / "alone")


def test_without_the_process_a_stage_makes_them_itself(beside, quick, rows, tmp_path, monkeypatch, capfd) -> None:
    ask = RowsAhead.ask

    def die(self, wanted) -> None:
        ask(self, wanted)
        self._process.kill()

    monkeypatch.setattr(RowsAhead, "ask", die)
    assert main(command(rows, tmp_path / "out")) == 0
    assert capfd.readouterr().out.count("rows could not be made ahead: the process was killed") == 1
    assert recovered(tmp_path / "out")


def test_what_the_process_could_not_read_is_the_stages_error(beside, rows, tmp_path, monkeypatch, capfd) -> None:
    ask = RowsAhead.ask

    def spoil(self, wanted) -> None:
        rows.write_text('{"text": 5}\n')
        ask(self, wanted)

    monkeypatch.setattr(RowsAhead, "ask", spoil)
    assert main(command(rows, tmp_path / "out")) == 2
    printed = capfd.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: recover.0.data: ")
    assert "[recover.0 layerwise] rows could not be made ahead: " in printed.out


def test_it_is_alone_whatever_the_run_is_one_of(rows, tmp_path, monkeypatch) -> None:
    """With a launcher's variables it would wait for a second process; what lies in the folder is no package for it."""
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29613"}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets.py").write_text("raise SystemExit('not this one')")
    recipe = load_recipe("debug", ["device=cpu"])
    ahead = RowsAhead()
    try:
        ahead.ask(RowsOf(0, recipe.recover[0], [str(rows)], fetch(recipe.model), recipe.seed))
        with ThreadPoolExecutor(1) as beside:
            assert beside.submit(ahead.wait, 0).result(timeout=120) is None
    finally:
        ahead.end()


def test_the_check_of_the_export_waits_while_the_last_stage_trains(beside, quick, rows, tmp_path) -> None:
    """And is ended where the export is there already."""
    out, found = tmp_path / "out", []

    class Noted(InThisProcess):
        def __init__(self, *, stock: bool) -> None:
            super().__init__(stock=stock)
            found.append("made after" if (out / "recovered").exists() else "made before")

        def score(self, *given, **options):
            found.append("asked")
            return super().score(*given, **options)

        def end(self) -> None:
            found.append("ended")

    with pytest.MonkeyPatch.context() as patch:  # undone before `quick`, which monkeypatch is not
        patch.setattr("transmla.run.context.FreshProcess", Noted)
        assert main(command(rows, out)) == 0
        assert found == ["made before", "asked"]
        shutil.rmtree(out / "recovered")
        shutil.rmtree(out / "evaluation" / "recovered")
        assert main(command(rows, out)) == 0
    assert found[2:] == ["made before", "ended"]
