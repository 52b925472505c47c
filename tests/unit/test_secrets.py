"""Secrets: refused in a recipe, masked in every message; interpolations are saved as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from transmla.cli import main
from transmla.errors import RecipeError, masked
from transmla.recipe.compose import load_recipe
from transmla.recipe.secrets import check_interpolations, check_secrets
from transmla.run.artifacts import save_recipe

TOKEN = "hf_0123456789abcdefgh"


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"https://me:{TOKEN}@host/x", "https://***@host/x"),
        ("git+ssh://git@host/x", "git+ssh://***@host/x"),
        (f"no such file: {TOKEN}", "no such file: ***"),
        ("hub id org/hf_model, text a@b, https://host/a@b", "hub id org/hf_model, text a@b, https://host/a@b"),
    ],
)
def test_masks(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert str(RecipeError("model.source", text)) == f"model.source: {expected}"


@pytest.mark.parametrize(
    "tree",
    [
        {"recover": [{"trainer": {"hub_token": "abc"}}]},
        {"model": {"config": {"api_key": "abc"}}},
        {"model": {"source": "https://me:password@host/x"}},
        {"evaluate": {"prompts": ["fine", f"say {TOKEN}"]}},
        {"name": "a-very-secret-word"},
    ],
)
def test_refused_without_a_word_of_them(tree: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-very-secret-word")
    with pytest.raises(RecipeError) as error:
        check_secrets(tree)
    assert not any(word in str(error.value) for word in ("abc", "password", TOKEN, "a-very-secret-word"))


def test_what_is_no_secret(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false, and long enough")
    check_secrets({"tokens": 5, "trainer": {"eos_token": "<short>", "pad_token": "<x>"}, "max_new_tokens": 8})
    check_secrets({"trainer": {"hub_token": None}, "prompts": ["false, and long enough"]})


@pytest.mark.parametrize(
    "text", ["${oc.env:HF_TOKEN}", "a ${oc.env:'MY_PASSWORD', x}", "${oc.decode:${oc.env:A_SECRET}}"]
)
def test_a_secret_of_the_environment(text: str) -> None:
    with pytest.raises(RecipeError, match=r"recover.0.data.0: \$\{oc.env:"):
        check_interpolations({"recover": [{"data": [text]}]})


def test_interpolations_are_saved_as_they_stand(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TEXTS", "/texts/of/this/machine")
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults: [debug, _self_]\nevaluate:\n  data: ['${oc.env:TEXTS}/held.jsonl']\n"
        "  prompts: ['seed ${seed}']\n  tasks: ['${oc.env:TEXTS}/questions.jsonl']\n"
    )
    recipe = load_recipe(str(file), ["recover.1.tokens=${recover.0.tokens}", "seed=7"])
    assert recipe.evaluate.data == ["/texts/of/this/machine/held.jsonl"]
    assert (recipe.evaluate.prompts, recipe.recover[1].tokens) == (["seed 7"], 6144)
    save_recipe(recipe, tmp_path)
    saved = (tmp_path / "recipe.yaml").read_text()
    assert "/texts/of" not in saved
    tree = yaml.safe_load(saved)
    assert tree["evaluate"]["data"] == ["${oc.env:TEXTS}/held.jsonl"]
    assert (tree["evaluate"]["prompts"], tree["recover"][1]["tokens"]) == (["seed ${seed}"], "${recover.0.tokens}")
    monkeypatch.setenv("TEXTS", "/texts/of/another")
    assert OmegaConf.load(tmp_path / "recipe.yaml").evaluate.data == ["/texts/of/another/held.jsonl"]


def test_a_broken_file_is_not_quoted(tmp_path: Path, capsys) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text('name: "open sesame\n  : - {\n')
    assert main(["recover", f"recipe={file}"]) == 2
    printed = capsys.readouterr().err
    assert "not valid YAML" in printed and "(line" in printed and "sesame" not in printed
