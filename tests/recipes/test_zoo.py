"""The model zoo: every recipe plans without network; the table, what is skipped, and what a failure leaves."""

import json

import pytest

from transmla.cli import main
from transmla.families import FAMILIES
from transmla.plan.checks import prepare
from transmla.recipe.compose import load_recipe
from transmla.recipe.names import recipe_names

NAMES = [name for name in recipe_names() if name.startswith("zoo/")]
# Cached values that the source and the student have per token and layer.
CACHE = {
    "zoo/llama2_7b": (8192, 576),
    "zoo/llama3_8b_rope128": (2048, 576),
    "zoo/llama3.2_1b": (1024, 576),
    "zoo/qwen2.5_7b": (1024, 576),
    "zoo/qwen2.5_72b_instruct": (2048, 576),
    "zoo/gemma2_9b_it_rope256": (4096, 576),
    "zoo/mistral_7b_v0.3": (2048, 576),
    "zoo/mixtral_8x7b_v0.1": (2048, 576),
    "zoo/mimo_7b_base": (2048, 576),
    "zoo/qwen2.5_coder_0.5b_instruct": (256, 128),
    "zoo/gemma3_270m": (512, 256),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_every_published_row_has_a_recipe() -> None:
    assert len(NAMES) == 23 and set(CACHE) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_plans(name: str) -> None:
    recipe = load_recipe(name, ["dry_run=true", "device=cpu"])
    family = recipe.model.config["model_type"]
    if family not in FAMILIES:
        pytest.skip(f"no adapter for {family} yet")
    geometry = prepare(recipe, exports=False).geometry
    source, student = CACHE.get(name, (geometry.source_cache, 576))
    assert (geometry.source_cache, geometry.cache) == (source, student)


# Parameters of the published checkpoints, in billions: wrong facts would not add up.
@pytest.mark.parametrize(
    "name,billions",
    [
        ("llama2_7b", 6.738),
        ("llama3_8b", 8.030),
        ("llama3.2_1b", 1.236),
        ("qwen2.5_7b", 7.616),
        ("qwen2.5_72b", 72.706),
        ("gemma2_9b_it", 9.242),
        ("mistral_7b_v0.3", 7.248),
        ("mixtral_8x7b_v0.1", 46.703),
        ("qwen2.5_coder_0.5b_instruct", 0.494),
        ("gemma3_270m", 0.268),
    ],
)
def test_the_facts_give_the_published_size(name: str, billions: float) -> None:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from transmla.sources.config import source_config

    config = source_config(load_recipe(f"zoo/{name}").model)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(value.numel() for value in model.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_a_plan_of_a_zoo_recipe(capsys) -> None:
    assert main(["convert", "recipe=zoo/llama2_7b", "dry_run=true", "device=cpu"]) == 0
    assert "8192 -> 576" in capsys.readouterr().out
    assert main(["convert", "recipe=llama2_7b", "dry_run=true"]) == 2
    assert "did you mean zoo/llama2_7b" in capsys.readouterr().err


def test_the_list(capsys) -> None:
    assert main(["zoo", "--list"]) == 0
    assert capsys.readouterr().out.split() == NAMES


def test_the_table(tmp_path, capsys, monkeypatch) -> None:
    """One recipe that works and one whose model is not to be had: both are rows, the second run makes neither again."""
    missing = tmp_path / "missing.yaml"
    missing.write_text("defaults: [debug, _self_]\nname: missing\nmodel: {source: nobody/nothing}\n")
    words = ["zoo", f"recipe={missing}", "recipe=debug", "device=cpu", f"output_dir={tmp_path}/zoo"]
    assert main(words) == 1
    printed = capsys.readouterr().out
    table = (tmp_path / "zoo" / "zoo.md").read_text()
    assert table in printed and "| missing | failed: model.source: cannot download nobody/nothing" in table
    failed, row = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    assert "\n" not in failed["failed"]
    quality = row["quality"]
    assert quality["original"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < quality["partial_rope"]["kl"] < quality["mla"]["kl"]
    assert row["saving_percent"] == 50.0 and row["seconds"] > 0 and row["peak_memory_bytes"] > 0
    assert f"| debug | 24 + 8 | -50.0 % | {quality['original']['perplexity']:.4f} |" in table

    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *args: pytest.fail("a model was loaded")
    )
    assert main(words) == 1
    assert "[debug] unchanged, skipped" in capsys.readouterr().out
    assert (tmp_path / "zoo" / "zoo.md").read_text() == table
    # The student is the recipe's own: its recovery could start from it.
    assert main(["convert", "recipe=debug", "device=cpu", f"output_dir={tmp_path}/zoo/debug"]) == 0
    assert "[convert] unchanged, skipped" in capsys.readouterr().out


def test_mistakes(capsys, tmp_path) -> None:
    assert main(["zoo", "recipe=zoo/llama2", f"output_dir={tmp_path}"]) == 2
    assert "zoo/llama2_7b" in capsys.readouterr().err
    assert main(["zoo", "recipe=debug", "recipe=debug"]) == 2
    assert "two recipes are called debug" in capsys.readouterr().err
