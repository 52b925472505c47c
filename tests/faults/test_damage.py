"""Every kind of damage to every file that a run reads again: made anew to the last bit, or refused in one line."""

import shutil
from pathlib import Path

import pytest

from tests.faults.recipe import contents, save
from tests.unit.test_files import DAMAGES, empty, flip
from transmla.cli import main
from transmla.recover.checkpoints import AtomicCheckpoints
from transmla.run import pipeline

pytestmark = pytest.mark.faults
COMMAND = ["recipe=faults.yaml", "device=cpu"]
LAST = "checkpoints/2_distill/checkpoint-8"


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for verb in ("write", "record", "recover"):
            assert main([verb, *COMMAND]) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in the third stage, after the checkpoint of step 8."""
    folder = tmp_path_factory.mktemp("stopped")
    save(folder)
    original = AtomicCheckpoints._save_checkpoint

    def dying(self, model, trial) -> None:
        original(self, model, trial)
        if self.args.output_dir.endswith("2_distill") and self.state.global_step == 8:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(AtomicCheckpoints, "_save_checkpoint", dying)
        for verb in ("write", "record"):
            assert main([verb, *COMMAND]) == 0
        with pytest.raises(Killed):
            main(["recover", *COMMAND])
    assert (folder / "out" / LAST / "manifest.json").is_file()
    return folder


@pytest.fixture
def again(finished: Path, tmp_path, monkeypatch, capsys):
    """Copies a run, changes it, and gives the same command again, up to the last student or as a whole."""

    def again(folder: Path, change, *, whole: bool) -> None:
        shutil.copytree(folder, tmp_path / "run", symlinks=True)
        out = tmp_path / "run" / "out"
        change(out)
        monkeypatch.chdir(tmp_path / "run")
        if not whole:
            monkeypatch.setitem(pipeline.PIPELINES, "recover", pipeline.PIPELINES["recover"][:-2])
        code, wanted = main(["recover", *COMMAND]), contents(finished / "out")
        if code == 2:
            message = capsys.readouterr().err.strip().splitlines()[-1]
            assert message.startswith("error: ") and ("; run " in message or "; remove " in message)
            return
        found = contents(out)
        assert code == 0 and found == {name: digest for name, digest in wanted.items() if whole or name in found}
        assert found["recovered/model.safetensors"] == wanted["recovered/model.safetensors"]

    return again


CHECKPOINT = ["trained.safetensors", "optimizer.safetensors", "optimizer_groups.pt", "scheduler.pt", "rng_state.pth"]
CHECKPOINT += ["trainer_state.json", "manifest.json", "../fingerprint"]


@pytest.mark.parametrize(
    ("name", "change"), [*((name, flip) for name in CHECKPOINT), *((CHECKPOINT[1], change) for change in DAMAGES)]
)
def test_a_checkpoint(name: str, change, stopped: Path, again) -> None:
    again(stopped, lambda out: change(out / LAST / name), whole=False)


def test_a_checkpoint_without_files_and_strays(stopped: Path, again) -> None:
    def change(out: Path) -> None:
        shutil.rmtree(out / LAST)
        (out / LAST).mkdir()
        (out / LAST).with_name("checkpoint-99").mkdir()

    again(stopped, change, whole=False)


ARTIFACTS = [
    "converted/model.safetensors",
    "converted/statistics.safetensors",
    "converted/manifest.json",
    "stages/0_layerwise/model.safetensors",
    "stages/1_distill/config.json",
    "stages/2_distill/transmla.json",
    "recovered/model.safetensors",
    "written/own/data.jsonl",
    "written/own/data.yaml",
]


@pytest.mark.parametrize("change", DAMAGES)
def test_artifacts(change, finished: Path, again) -> None:
    """The last student is among them, so that what it is made of is read."""

    def damage(out: Path) -> None:
        for name in ARTIFACTS:
            change(out / name)

    again(finished, damage, whole=False)


READ = [
    "stages/2_distill/model.safetensors",
    "recorded/1/00000.bin",
    "recorded/1/index.json",
    "written/own.parts/000.jsonl",
]


@pytest.mark.parametrize("change", DAMAGES)
@pytest.mark.parametrize("name", READ)
def test_what_a_missing_student_is_made_of(name: str, change, finished: Path, again) -> None:
    def damage(out: Path) -> None:
        for folder in ("stages/1_distill", "stages/2_distill", "recovered", "written/own"):
            if not name.startswith(folder + "/"):
                shutil.rmtree(out / folder)
        change(out / name)

    again(finished, damage, whole=False)


FINAL = [
    "exported/model.safetensors",
    "exported/config.json",
    "exported/transmla.json",
    "evaluation/teacher/transmla.json",
]
FINAL += ["evaluation/teacher/sample_heldout-*.safetensors", "evaluation/exported/transmla.json"]


@pytest.mark.parametrize("change", DAMAGES)
def test_what_a_run_ends_with(change, finished: Path, again) -> None:
    def damage(out: Path) -> None:
        for name in FINAL:
            (file,) = out.glob(name)
            change(file)

    again(finished, damage, whole=True)


@pytest.mark.parametrize(
    ("name", "change"), [("config.json", Path.unlink), ("tokenizer.json", empty), ("model.safetensors", flip)]
)
def test_the_cached_source(name: str, change, finished: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRANSMLA_CACHE", str(tmp_path / "cache"))
    save(tmp_path)
    monkeypatch.chdir(tmp_path)
    wanted = contents(finished / "out")["converted/model.safetensors"]
    for damaged in (False, True):
        if damaged:
            change(next((tmp_path / "cache").glob("random-*")) / name)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert main(["convert", *COMMAND]) == 0
        assert contents(tmp_path / "out")["converted/model.safetensors"] == wanted


def test_files_and_links_in_the_way(finished: Path, again, tmp_path) -> None:
    """What links lead to is not touched."""

    def change(out: Path) -> None:
        shutil.move(out / "converted", out / "logs")
        (out / "logs" / "transmla.json").unlink()
        (out / "converted").symlink_to(out / "logs")
        shutil.rmtree(out / "exported")
        (out / "exported").write_text("a file")
        (out / ".partial-exported").symlink_to(out / "figures")

    again(finished, change, whole=False)
    out = tmp_path / "run" / "out"
    assert not (out / "converted").is_symlink() and (out / "logs" / "model.safetensors").is_file()
    assert main(["export", *COMMAND]) == 0
    assert (out / "exported" / "model.safetensors").is_file() and (out / "figures" / "loss.png").is_file()
