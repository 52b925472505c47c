"""`transmla verify DIR`: what it checks of a finished output directory, and what it finds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import quickly
from transmla.cli import main
from transmla.files import remove, save_manifest

COMMAND = [
    "recover",
    "recipe=debug",
    "device=cpu",
    "evaluate.require=[{measure: kl, data: sample_heldout, at_most: 5.0}]",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "debug"
    with quickly():
        assert main([*COMMAND, f"output_dir={out}"]) == 0
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path, quick) -> Path:
    """A copy elsewhere, with nothing of what it was made from."""
    return Path(shutil.copytree(made, tmp_path / "moved"))


def verified(folder: Path, capsys) -> tuple[int, dict[str, str]]:
    """Exit code, and what is missed by the first words of its line."""
    capsys.readouterr()
    code = main(["verify", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    return code, {line.split("  ")[0]: line for line in lines if "MISS" in line}


def test_a_whole_one(folder: Path, capsys) -> None:
    assert verified(folder, capsys) == (0, {})


def test_a_deleted_earlier_result_is_no_miss(folder: Path, capsys) -> None:
    shutil.rmtree(folder / "stages")
    shutil.rmtree(folder / "converted")
    shutil.rmtree(folder / "evaluation" / "teacher")
    assert verified(folder, capsys) == (0, {})


def test_a_recipe_without_recovery(tmp_path: Path, capsys, quick) -> None:
    assert main([*COMMAND, f"output_dir={tmp_path / 'out'}", "recover=[]", "evaluate.require=[]"]) == 0
    assert verified(tmp_path / "out", capsys) == (0, {})


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(file: Path, change) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree, indent=1))


def other_weights(folder: Path) -> None:
    """Weights that somebody replaced, with the manifest."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "o_proj" in name)
    weights[name] = weights[name] + 0.1 * torch.randn_like(weights[name])
    save_file(weights, file, metadata={"format": "pt"})
    save_manifest(folder)


def quality(report: dict) -> None:
    report["quality"]["exported"]["sample_heldout"]["kl"] /= 2


DAMAGE = {
    "a changed byte": (lambda folder: change(folder / "recovered" / "model.safetensors"), ["recovered"]),
    "an earlier stage's": (
        lambda folder: change(folder / "stages/0_layerwise/model.safetensors"),
        ["stages/0_layerwise"],
    ),
    "a lost file": (lambda folder: remove(folder / "exported" / "tokenizer.json"), ["exported"]),
    "no export": (lambda folder: remove(folder / "exported"), ["exported"]),
    "no student": (lambda folder: remove(folder / "recovered"), ["recovered"]),
    "another figure": (lambda folder: edit(folder / "report.json", quality), ["report.json"]),
    "other seconds": (
        lambda folder: edit(folder / "report.json", lambda report: report["stages"][0].update(seconds=0.0)),
        ["report.json"],
    ),
    "no report": (lambda folder: remove(folder / "report.json"), ["report.json"]),
    "a report cut off": (lambda folder: (folder / "report.json").write_text('{"stages": ['), ["report.json"]),
    "a report of another form": (
        lambda folder: (folder / "report.json").write_text('{"stages": [1]}'),
        ["report.json"],
    ),
    "other weights in the export": (lambda folder: other_weights(folder / "exported"), ["scores of the export"]),
    "other weights in the student": (lambda folder: other_weights(folder / "recovered"), ["scores of the export"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_it_finds(name: str, folder: Path, capsys) -> None:
    damage, misses = DAMAGE[name]
    damage(folder)
    code, found = verified(folder, capsys)
    assert code == 1 and sorted(found) == sorted(misses)


def test_a_missed_threshold(folder: Path, capsys) -> None:
    def lower(report: dict) -> None:
        report["required"][0]["met"] = False

    edit(folder / "report.json", lower)
    code, found = verified(folder, capsys)
    assert code == 1 and sorted(found) == ["report.json", "thresholds"]


@pytest.mark.parametrize("word", ["nowhere", "empty", "file"])
def test_what_is_no_output_directory(word: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["verify", str(tmp_path / word)]) == 2
    assert capsys.readouterr().err.startswith("error: verify: ")


def test_an_engine_beside_the_student(folder: Path, capsys) -> None:
    words = ["verify", str(folder), "--engine", "transformers", "--prompts", "2", "--new-tokens", "8"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "16 of 16 the same" in out and "beside the student in float32" in out

    other_weights(folder / "recovered")
    assert main(words) == 1
    missed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "MISS" in line]
    assert "log-probabilities" in missed

    change(folder / "exported" / "model.safetensors")
    assert main(words) == 1
    assert "not asked: files are missing or damaged" in capsys.readouterr().out
