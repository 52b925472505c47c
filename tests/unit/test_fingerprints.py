"""What makes a finished artifact be made again, and what does not."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from transmla.plan.checks import prepare
from transmla.recipe.compose import load_recipe
from transmla.run.fingerprints import Fingerprints
from transmla.sources.hub_commits import commit_of
from transmla.sources.random_model import make_random_model

# What the digest of a conversion has been made of since there is one.
FIRST_GEOMETRY = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim qk_nope_head_dim
    qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank freqfold collapse latent_norm"""
FIRST_CONVERT = """method qk_rope_head_dim kv_lora_rank cached_values q_lora_rank freqfold collapse mixing mean_rotation
    weighting kv_balance refit drift latent_norm calibration"""
DISTILL = "recover.1.trainer.packing_strategy=wrapped"


def stage(folder: Path, *overrides: str) -> str:
    recipe = load_recipe("debug", ["device=cpu", f"output_dir={folder}", *overrides])
    return Fingerprints(prepare(recipe, exports=False)).stage(1)


def test_what_only_costs_is_no_input(tmp_path) -> None:
    plain = stage(tmp_path, DISTILL)
    assert stage(tmp_path, DISTILL, "recover.1.keep_teacher=true") == plain
    assert stage(tmp_path, DISTILL, "recover.1.keep_teacher=false") == plain
    assert stage(tmp_path, DISTILL, "recover.1.trainer.learning_rate=1") != plain


def test_a_mark_of_synthetic_text_is_an_input(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "b"}))
    found = set()
    for mark in ("", ", synthetic: false", ", synthetic: true"):
        (tmp_path / "a.yaml").write_text(f"{{path: a.jsonl, columns: {{text: text}}{mark}}}")
        found.add(stage(tmp_path, f"recover.1.data=[{tmp_path}/a.yaml]"))
    assert len(found) == 2  # unmarked is what it was before there were marks
    mixed = "recover.1.cross_entropy=0.1"
    assert stage(tmp_path, mixed) != stage(tmp_path, mixed, "recover.1.synthetic_cross_entropy=true")


@pytest.mark.parametrize("change", ["recover.1.trainer.packing_strategy=wrapped", "recover.1.compile=true"])
def test_rows_that_became_others_are_marked(change: str, tmp_path, monkeypatch) -> None:
    """Short rows are joined since, and a compiled epoch has no rest: what was trained without is made again."""
    now = stage(tmp_path, change)
    monkeypatch.setattr("transmla.run.fingerprints._rows", lambda stage: {})
    assert stage(tmp_path, change) != now


def test_other_stages_are_what_they_were(tmp_path, monkeypatch) -> None:
    now = stage(tmp_path)
    monkeypatch.setattr("transmla.run.fingerprints._rows", lambda stage: {})
    assert stage(tmp_path) == now


def everything(folder: Path, *overrides: str) -> list[str]:
    """Digests of all artifacts of a recipe that reads files and a model directory of a project."""
    text, model = folder / "text.jsonl", folder / "model"
    recipe = load_recipe(
        "debug",
        [
            "device=cpu",
            f"output_dir={folder}/out",
            f"model.source={model}",
            f"convert.calibration.data=[{text}]",
            f"recover.0.data=[{text}]",
            f"recover.1.data=[{{name: {folder}/words.yaml, weight: 1}}]",
            *overrides,
        ],
    )
    found = Fingerprints(prepare(recipe, exports=False))
    return [found.convert, found.stage(0), found.stage(1), found.export, found.evaluation("recovered")]


@pytest.fixture
def project(tmp_path) -> Path:
    folder = tmp_path / "project"
    source = load_recipe("debug", []).model
    make_random_model(source, folder / "model")
    (folder / "text.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    (folder / "words.yaml").write_text("{path: text.jsonl, columns: {text: text}}")
    return folder


FILES = ["text.jsonl", "model/model.safetensors", "model/tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_only_the_content_of_a_file_is_an_input(name: str, project: Path) -> None:
    """Neither its time nor its place: not an edit of equal size and time, which `touch` is not either."""
    before, file = everything(project), project / name
    time = file.stat().st_mtime_ns
    os.utime(file, ns=(time + 10**9, time + 10**9))
    assert everything(project) == before
    content = bytearray(file.read_bytes())
    if name.endswith("tokenizer.json"):
        content = content.replace(b"  ", b"\t ", 1)  # it is read before anything is made of it
    else:
        content[-4] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(time, time))
    assert not set(everything(project)) & set(before)


def test_a_project_may_move(project: Path, tmp_path) -> None:
    before = everything(project)
    shutil.copytree(project, tmp_path / "elsewhere")
    assert everything(tmp_path / "elsewhere") == before
    (project / "model" / "README.md").write_text("about")
    assert everything(project) == before


def test_the_commit_of_a_hub_repository_is_an_input(tmp_path, monkeypatch) -> None:
    """Of its main branch as it is now; offline as it was."""
    monkeypatch.setenv("TRANSMLA_CACHE", str(tmp_path))
    (tmp_path / "far.yaml").write_text("{hub: some/where, columns: {text: text}}")
    monkeypatch.setattr("transmla.plan.data_checks.check_dataset", lambda *args, **kwargs: "text")
    answers: dict[str, str | None] = {"sha": "a" * 40}

    def ask(self, repository: str, **kwargs: object) -> SimpleNamespace:
        if answers["sha"] is None:
            raise ConnectionError("offline")
        return SimpleNamespace(sha=answers["sha"])

    def digest() -> str:
        commit_of.cache_clear()
        return stage(tmp_path, f"recover.1.data=[{tmp_path}/far.yaml]")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", ask)
    first = digest()
    answers["sha"] = "b" * 40
    second = digest()
    answers["sha"] = None
    assert digest() == second != first


def test_one_latent_is_what_it_was(tmp_path, monkeypatch) -> None:
    """What was converted before there could be several is good."""
    plain = stage(tmp_path)
    assert stage(tmp_path, "convert.latent_heads=1", "convert.tied=false") == plain
    others = ["convert.latent_heads=2"], ["convert.tied=true", "convert.kv_lora_rank=16"]
    assert len({plain, *(stage(tmp_path, *words) for words in others)}) == 3
    monkeypatch.setattr("transmla.run.fingerprints.LATER", ())
    assert stage(tmp_path) != plain


def test_no_key_that_came_later_is_an_input_at_its_default(tmp_path, monkeypatch) -> None:
    """A key of `convert` or a field of the geometry that is new belongs into LATER: else every conversion is made
    again."""
    given = []
    monkeypatch.setattr("transmla.run.fingerprints.fingerprint", lambda inputs: given.append(inputs) or "digest")
    stage(tmp_path)
    found = next(inputs for inputs in given if isinstance(inputs, dict) and "geometry" in inputs)
    assert set(found["geometry"]) == set(FIRST_GEOMETRY.split())
    assert set(found["convert"]) == set(FIRST_CONVERT.split())
