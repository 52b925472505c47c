"""What a model directory says of itself: its configuration, its generation configuration, its code."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import transmla
from tests.source_folder import copy_of, edit_json, make_source, refusal
from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource
from transmla.sources.config import read_config, source_config
from transmla.sources.generation import read_generation
from transmla.sources.local_model import load_source
from transmla.sources.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model")


# Vicuna 1.5, Llama 2 chat as first published, Qwen's list of ends, and what else transformers refuses to save.
GENERATION: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
    ({"top_k": 20, "do_sample": None}, {"top_k": 20, "do_sample": True}),
    ({"temperature": 0.6, "do_sample": False, "eos_token_id": [0, 1]}, {"eos_token_id": [0, 1]}),
    ({"temperature": 0.0}, {}),
    ({"pad_token_id": -1, "min_p": 0.1}, {"min_p": 0.1, "do_sample": True}),
    ({"num_beams": 1, "length_penalty": 2.0, "early_stopping": True, "output_scores": True}, {"num_beams": 1}),
    ({"num_return_sequences": 4}, {}),
    ({"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 4, "length_penalty": 2.0}),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"do_sample": True, "temperature": 0.6, "top_p": 0.95}),
]


@pytest.mark.parametrize("content,kept", GENERATION)
def test_a_generation_configuration_can_be_saved(source: Path, tmp_path: Path, content, kept) -> None:
    folder = copy_of(source, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(content))
    model = load_source(folder, torch.float32, "cpu")
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved[name] for name in kept} == kept
    assert not [name for name in content if name not in kept and saved.get(name) not in (None, content[name])]
    assert saved.get("do_sample", False) is kept.get("do_sample", False)
    for name in {"temperature", "length_penalty", "pad_token_id", "num_return_sequences"} - kept.keys():
        assert name not in content or saved.get(name) != content[name]


@pytest.mark.parametrize("content", ["{", "[1]", '{"temperature": "hot"}', '{"max_new_tokens": -4}'])
def test_a_generation_configuration_that_nobody_reads(source: Path, tmp_path: Path, capsys, content: str) -> None:
    folder = copy_of(source, tmp_path / "model")
    (folder / "generation_config.json").write_text(content)
    assert "generation_config.json cannot be used" in refusal(folder, tmp_path, capsys, "dry_run=true")


def test_no_padding_is_no_padding(source: Path, tmp_path: Path) -> None:
    """-1 would be the last row of the embedding, which then gets no gradient."""
    folder = copy_of(source, tmp_path / "model")
    edit_json(folder / "config.json", pad_token_id=-1)
    (folder / "generation_config.json").unlink()
    model = load_source(folder, torch.float32, "cpu")
    assert model.config.pad_token_id is None and model.generation_config.pad_token_id is None
    assert model.get_input_embeddings().padding_idx is None
    assert read_generation(folder, read_config(folder, "k"), "k").eos_token_id == 0


CONFIGS: dict[str, dict[str, Any]] = {
    "num_attention_heads 0": {"num_attention_heads": 0},
    "num_hidden_layers 0": {"num_hidden_layers": 0},
    "hidden_size -64": {"hidden_size": -64},
    "4 query heads for 3 key heads": {"num_key_value_heads": 3},
    "heads": {"hidden_size": 66, "head_dim": None},
    "head": {"head_dim": 15},
    "expected int, got str": {"hidden_size": "many"},
    "rms_norm_eps 0.0": {"rms_norm_eps": 0.0},
    "rope_theta 0.0": {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
    "factor 0.0": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}},
    "pad_token_id 260 among 260 tokens": {"pad_token_id": 260},
    "builds no model of its configuration: 'banana'": {"hidden_act": "banana"},
    "names no model_type": {"model_type": None},
    "no adapter for model type 'banana'": {"model_type": "banana"},
    "has per_layer_config": {"per_layer_config": {"0": {"num_attention_heads": 2}}},
    "has transformers_weights": {"transformers_weights": "other.safetensors"},
}


@pytest.mark.parametrize("reason", CONFIGS)
def test_a_configuration_that_no_model_has(source: Path, tmp_path: Path, capsys, reason: str) -> None:
    folder = copy_of(source, tmp_path / "model")
    edit_json(folder / "config.json", **CONFIGS[reason])
    line = refusal(folder, tmp_path, capsys, "dry_run=true")
    assert line.startswith("error: model.source: ") and reason in line


def test_what_a_configuration_says_of_attention_kernels_is_not_followed(source: Path, tmp_path: Path) -> None:
    """transformers would fetch such a kernel from the hub and run it."""
    folder = copy_of(source, tmp_path / "model")
    edit_json(folder / "config.json", attn_implementation="someone/kernel")
    assert read_config(folder, "k")._attn_implementation is None
    assert load_source(folder, torch.float32, "cpu").config._attn_implementation == "sdpa"


def test_facts(tmp_path: Path, source: Path, capsys) -> None:
    """Wrong ones, and pins that nothing would look at."""
    facts = {"model_type": "llama", "vocab_size": 260}
    for section, key, reason in (
        ({"source": str(source), "config": facts | {"hidden_size": 128}}, "hidden_size", "the model has 64"),
        ({"source": "random", "config": {"vocab_size": 260}}, "model_type", "no adapter"),
        ({"source": str(source), "sha256": "0" * 64}, "sha256", "leave it out"),
        ({"source": str(source), "revision": "main"}, "revision", "leave it out"),
    ):
        with pytest.raises(RecipeError, match=reason) as refused:
            source_config(ModelSource(**section))
        assert refused.value.key.rpartition(".")[2] == key


def _code(folder: Path) -> None:
    """Code that would leave a file, in all the places where transformers looks for some."""
    text = f"open({str(folder / 'RAN')!r}, 'w')\nfrom transformers import LlamaConfig, PreTrainedTokenizerFast\n"
    text += "class C(LlamaConfig):\n    model_type = 'own'\nclass M: pass\nclass T(PreTrainedTokenizerFast): pass\n"
    (folder / "own.py").write_text(text)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(text)


def test_code_of_a_model_is_never_run_nor_asked_about(source: Path, tmp_path: Path, capsys) -> None:
    folder = copy_of(source, tmp_path / "model")
    _code(folder)
    edit_json(
        folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    )
    assert "its code would have to be run" in refusal(folder, tmp_path, capsys)
    edit_json(folder / "config.json", model_type="llama")  # transformers' own class reads it
    edit_json(folder / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "own.T"]})
    assert "code of its own" in refusal(folder, tmp_path, capsys)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    load_tokenizer(folder, "k")
    load_source(folder, torch.float32, "cpu")
    assert not (folder / "RAN").exists()


def test_nothing_of_the_package_trusts_code() -> None:
    """Every call that could run code of a repository says that it must not."""
    calls = {"from_pretrained", "from_config"}
    for file in Path(transmla.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in calls:
                said = {word.arg: word.value for word in node.keywords}
                trust = said.get("trust_remote_code")
                spread = [word for word in said if word is None]  # gguf.py: a dictionary, checked below
                named = isinstance(trust, ast.Constant) and trust.value is False
                assert named or (spread and '"trust_remote_code": False' in file.read_text()), (file, node.lineno)
