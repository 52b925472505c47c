"""What is quick to see is refused before anything slow is imported: torch, transformers' model code, trl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.source_folder import WEIGHTS, make_source
from transmla.families import FAMILIES
from transmla.registration import AUTO

SLOW = ("torch", "transformers.modeling_utils", "trl", "peft", "datasets")


def imported_by(words: list[str], folder: Path) -> tuple[set[str], str]:
    """Which slow packages a refused command has imported, and what it said."""
    script = (
        "import json, sys\nfrom transmla.cli import main\n"
        f"assert main(['recover', *json.loads(sys.argv[1]), 'output_dir=out']) == 2\n"
        f"print(json.dumps([name for name in {SLOW!r} if name in sys.modules]))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    settings = os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, json.dumps(words)]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stdout.splitlines()[-1])), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model that lacks the end of its weights."""
    folder = tmp_path_factory.mktemp("quick")
    weights = make_source(folder / "m") / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["recover.0.data=[gone.jsonl]"], "recover.0.data"),
        (["model={source: ./gone}"], "model.source"),
        (["model={source: ./m}"], "model.source"),
    ],
)
def test_without_torch(words: list[str], key: str, folder: Path) -> None:
    found, said = imported_by(["recipe=debug", *words], folder)
    assert said.startswith(f"error: {key}") and not found, (found, said)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["convert.kv_lora_rank=1000"], "convert.kv_lora_rank"),
        (["recover.0.tokens=3"], "recover.0.tokens"),
        (["recover.0.trainer.max_length=100000", "recover.0.tokens=1000000"], "recover.0.trainer.max_length"),
        (["evaluate.max_new_tokens=1000"], "evaluate.max_new_tokens"),
    ],
)
def test_without_model_code(words: list[str], key: str, folder: Path) -> None:
    found, said = imported_by(["recipe=debug", *words], folder)
    assert said.startswith(f"error: {key}") and found <= {"torch"}, (found, said)


def test_the_first_call_registers() -> None:
    """In a fresh process: AutoConfig knows the configurations without model code, AutoModelForCausalLM the models; and
    afterwards both are as transformers made them."""
    script = (
        "import sys, transmla\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "small = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)\n"
        "config = AutoConfig.for_model('mla_llama', **small)\n"
        "assert type(config).__name__ == 'MLALlamaConfig' and 'transformers.modeling_utils' not in sys.modules\n"
        "try:\n    AutoModelForCausalLM.from_config(config)\nexcept AttributeError:\n    pass\n"  # it has no dimensions
        "from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as known\n"
        "assert known[type(config)].__name__ == 'MLALlamaForCausalLM'\n"
        "assert not any(type(value).__name__ == '_Guarded' for value in AutoModelForCausalLM.__dict__.values())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_family_has_its_classes() -> None:
    for family in FAMILIES.values():
        assert family.student_model.__name__ == family.architecture
        assert family.student_model.config_class is family.student_config
        assert AutoConfig.for_model(family.student_config.model_type).__class__ is family.student_config
        assert AutoModelForCausalLM._model_mapping[family.student_config] is family.student_model
    assert {auto.name for auto in AUTO} == {"AutoConfig", "AutoModelForCausalLM"}
    mimo = FAMILIES["mimo"]
    assert mimo.source_model.config_class is mimo.source_config
