"""Limits of a recipe: names, places, files that expand, and memory and disk that are counted once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

from transmla.errors import RecipeError
from transmla.plan.disk import Made, bytes_by_artifact, peak_of
from transmla.plan.memory import Sizes, step_memory, training_memory
from transmla.plan.model_facts import check_facts_of_recipe
from transmla.plan.output_folder import OWN, check_output_folder, output_folder
from transmla.recipe.compose import load_recipe
from transmla.recipe.folder_name import as_folder_name, check_folder_name, check_path
from transmla.recipe.names import recipe_names
from transmla.recipe.yaml_limits import NODES, read_tree
from transmla.run.paths import Paths


@pytest.mark.parametrize("name", ["own", "größe-模型", "qwen2.5_7b", "a=b", "3+4", "x" * 120])
def test_names_of_folders(name: str) -> None:
    assert check_folder_name(name) == name == as_folder_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", ".own", "-x", "a b", "own\n", "a\0", "x" * 121, "模" * 41, "a.parts"]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="choose another|names a folder"):
        check_folder_name(name)


def test_a_recipe_is_called_like_its_file(tmp_path: Path) -> None:
    (tmp_path / "my first recipe.yaml").write_text("defaults: [debug, _self_]\n")
    (tmp_path / "bare.yaml").write_text("defaults: [debug, _self_]\nname: other\n")
    assert load_recipe("debug").name == "debug"
    assert load_recipe(str(tmp_path / "my first recipe.yaml")).name == "debug"  # debug.yaml says so
    assert load_recipe(str(tmp_path / "bare.yaml")).name == "other"
    assert as_folder_name("../ my recipe") == "_my_recipe"


@pytest.mark.parametrize("path", ["", " ", "a\nb", "a\0b", "x" * 300, f"a/{'模' * 100}/b"])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(ValueError, match="correct it"):
        check_path(path)


def test_the_home_of_a_user(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe("debug", ["output_dir='~/runs/{name}'", "recover.1.record.folder='~/kept'"])
    assert output_folder(recipe) == tmp_path / "runs" / "debug"
    assert Paths(tmp_path, recipe).recording(1) == tmp_path / "kept"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (root / "evaluation").mkdir(parents=True)
    elsewhere.mkdir()
    (root / "notes").symlink_to(elsewhere)  # the user's own, which no run looks at
    (root / "logs").symlink_to(root / "evaluation")  # it stays inside
    check_output_folder(root)
    (tmp_path / "link").symlink_to(root)
    check_output_folder(tmp_path / "link")
    (root / "evaluation" / "teacher").symlink_to(elsewhere)
    with pytest.raises(RecipeError, match=r"output_dir: .*teacher is a link to .*elsewhere"):
        check_output_folder(root)


def test_all_that_a_run_makes_is_looked_at(tmp_path: Path) -> None:
    paths = Paths(tmp_path, load_recipe("debug"))
    made = [paths.written("x"), paths.converted, paths.stage(0), paths.stage(1), paths.checkpoints(0), paths.exported]
    made += [paths.recording(1), paths.evaluation("teacher"), paths.replies("teacher", "x"), paths.logs]
    assert {path.relative_to(tmp_path).parts[0] for path in made} <= set(OWN)


def test_files_that_expand(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"

    def refused(text: str) -> str:
        file.write_text(text)
        with pytest.raises(RecipeError) as error:
            read_tree(file)
        return str(error.value)

    doubled = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    assert f"{NODES:,} values" in refused(doubled)
    merged = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
    assert f"{NODES:,} values" in refused(merged)
    assert "contains itself" in refused("a: &a [*a]\n")
    assert "nested too deeply" in refused("a: " + "[" * 5000 + "]" * 5000)
    file.write_text(yaml.safe_dump({"a": list(range(NODES - 10))}))
    assert len(read_tree(file)["a"]) == NODES - 10


def test_an_artifact_stands_until_its_replacement_is_whole() -> None:
    first = [Made(new=10), Made(new=10, beside=30), Made(new=5)]
    assert peak_of(first) == 10 + 30 + 10
    again = [Made(new=10, old=10), Made(new=10, old=10, beside=30), Made(new=5, old=5)]
    assert peak_of(again) == 30 + 10  # not nothing, as much as there is already
    assert peak_of([]) == 0


def test_checkpoints_that_are_kept_count_on_disk() -> None:
    sizes = Sizes(source=1000, student=1000, attention=400, adapters={})

    def counted(*overrides: str) -> int:
        recipe = load_recipe("debug", [*(f"recover.0.trainer.{word}" for word in overrides)])
        return bytes_by_artifact(recipe, sizes, LlamaConfig(), torch.float32).checkpoints[0]

    one = 12 * 400  # nothing of the 600 that stay as they are
    assert counted("save_steps=1") == 3 * one  # two, and the newest before the oldest goes
    assert counted("save_steps=1", "save_total_limit=null") == (6144 // 256 + 1) * one
    assert counted("save_steps=1000") == one
    assert counted("save_strategy=no") == 0


def test_a_kept_teacher_leaves_room_for_a_step_alone() -> None:
    """The weights are on the device already when the states ask for room."""
    stage = load_recipe("smollm2_135m_gpu", []).recover[1]
    config = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, vocab_size=49152)
    sizes = Sizes(source=134_515_008, student=138_385_728, attention=30_412_800, adapters={})
    weights = training_memory(stage, sizes, config, torch.bfloat16) - step_memory(stage, sizes, config, torch.bfloat16)
    trained = sizes.trained(stage)
    assert weights >= 2 * sizes.source + 2 * trained


def test_facts_of_every_shipped_model_are_known() -> None:
    for name in recipe_names():
        check_facts_of_recipe(load_recipe(name))
    with pytest.raises(RecipeError, match=r"model.config.hiden_size: no such fact \(did you mean hidden_size\?\)"):
        check_facts_of_recipe(load_recipe("debug", ["model.config.hiden_size=64"]))
