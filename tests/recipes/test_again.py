"""The same command once more: over what was deleted, damaged or made by a longer recipe."""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.conftest import quickly
from tests.unit.test_files import flip, half
from transmla.cli import main
from transmla.recipe.names import share

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`long.yaml` is the recipe debug, `short.yaml` ends after its first stage."""
    folder = tmp_path_factory.mktemp("recipes")
    tree = yaml.safe_load((share("recipes") / "debug.yaml").read_text())
    for name, stages in (("long", tree["recover"]), ("short", tree["recover"][:1])):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**tree, "recover": stages}))
    return folder


@pytest.fixture(scope="module")
def finished(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    with quickly():
        assert main(["recover", f"recipe={recipes}/long.yaml", "device=cpu", f"output_dir={out}"]) == 0
    return out


@pytest.fixture
def out(finished: Path, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def weights(out: Path) -> dict[str, str]:
    files = sorted(out.rglob("*.safetensors"))
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def run(recipes: Path, out: Path, capsys):
    """Runs a verb of a recipe; gives its exit code, the labels of what was made, and what was printed."""

    def run(name: str = "long", verb: str = "recover", *words: str, raises=()) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = -1
        with suppress(raises):
            code = main([verb, f"recipe={recipes}/{name}.yaml", "device=cpu", f"output_dir={out}", *words])
        printed = capsys.readouterr()
        made = [line[1 : line.index("]")] for line in printed.out.splitlines() if line.endswith("] ...")]
        return code, made, printed.out + printed.err

    return run


def test_what_a_later_result_does_not_need_is_not_made_again(run, out: Path) -> None:
    for name in ("converted", "stages", "evaluation/recovered"):
        shutil.rmtree(out / name)
    code, made, printed = run()
    assert (code, made) == (0, ["evaluate recovered"])  # it needs what the conversion measured
    assert "[convert] not there" in printed and "[recover.0 layerwise] not there, and not needed" in printed
    again = run("long", "recover", "recover.1.temperature=2", "export.verify.tolerance=1e-12")
    assert again[1] == ["convert", "recover.0 layerwise", "recover.1 distill", "export"]


def test_a_recipe_that_was_shortened_finds_its_result_and_keeps_the_longer_one(run, out: Path) -> None:
    before = weights(out)
    code, made, printed = run("short")
    assert code == 0 and made[0] == "export"
    assert f"it is kept as {out / 'stages' / '1_distill'}" in printed
    now = weights(out)
    assert now["stages/1_distill/model.safetensors"] == before["recovered/model.safetensors"]
    assert now["recovered/model.safetensors"] == before["stages/0_layerwise/model.safetensors"]
    assert run("long", "evaluate")[:2] == (0, ["evaluate recovered"])
    now = weights(out)
    assert all(now[name] == before[name] for name in now if name.startswith(("recovered", "stages")))


def test_damage_is_mended(run, finished: Path, out: Path) -> None:
    """Nothing else is made again. Every kind of damage to every file is in tests/faults."""
    flip(out / "converted" / "model.safetensors")
    (out / "stages" / "0_layerwise" / "model.safetensors").unlink()
    half(out / "evaluation" / "teacher" / "transmla.json")
    code, made, printed = run()
    assert (code, made) == (0, ["convert", "recover.0 layerwise", "evaluate teacher"])
    assert printed.count("is damaged") == 3
    assert weights(out) == weights(finished)


@pytest.mark.parametrize("change", [Path.unlink, flip])
def test_damage_that_a_verb_cannot_mend_is_refused_by_name(change, run, out: Path) -> None:
    change(out / "exported" / "model.safetensors")
    for verb in ("verify", "evaluate"):
        code, made, printed = run("long", verb)
        assert (code, made) == (2, []) and f"{out}/exported" in printed and "model.safetensors" in printed
    change(out / "recovered" / "model.safetensors")
    code, made, printed = run("long", "export")
    assert (code, made) == (2, []) and f"{out}/recovered" in printed and "run recover.py" in printed


def test_what_a_killed_run_left_is_cleared(run, out: Path) -> None:
    """Folders that were half made, and the checkpoints of a stage that was published."""
    before = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    left = [
        ".partial-exported",
        ".partial-reload-of-exported",
        "stages/.partial-0_layerwise",
        "evaluation/.partial-teacher",
    ]
    for name in [*left, "checkpoints/1_distill/checkpoint-6", "checkpoints/0_layerwise/.partial"]:
        (out / name).mkdir(parents=True)
        (out / name / "model.safetensors").write_text("half")
    assert run()[:2] == (0, [])
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == before
