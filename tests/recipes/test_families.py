"""Every family through a whole recipe: convert, both recovery stages, evaluation, and the format that it ends in."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.numerics.test_families import GEMMA2, GEMMA3, GEMMA3_ROPE
from tests.source_folder import make_leaning_mixtral
from transmla.cli import main
from transmla.recipe.names import share

FAMILIES = {
    "mistral": ("deepseek_v3", {"sliding_window": None}),
    "mistral with a window": ("mla_mistral", {"model_type": "mistral", "sliding_window": 16}),
    "mimo": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
    "mixtral": ("mla_mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3": ("mla_qwen3", {}),
    "gemma2": ("mla_gemma2", GEMMA2 | {"sliding_window": 16}),
    "gemma3_text": ("mla_gemma3_text", GEMMA3 | {"sliding_window": 16, "rope_parameters": GEMMA3_ROPE}),
}


def write_recipe(family: str, folder: Path) -> Path:
    """The debug recipe on a random model of a family, with fewer steps."""
    tree = yaml.safe_load((share("recipes") / "debug.yaml").read_text())
    facts = tree["model"]["config"]
    if family == "gemma3_text":
        del facts["rope_parameters"]  # merged by Hydra it would be one rope for all layers
    tree["model"]["config"] = facts | {"model_type": family.split()[0]} | FAMILIES[family][1]
    tree["name"] = "family"
    tree["recover"][0]["tokens"], tree["recover"][1]["tokens"] = 3072, 1024
    tree["evaluate"]["max_new_tokens"] = 4
    file = folder / "family.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_a_whole_recipe(family: str, tmp_path: Path, capsys: pytest.CaptureFixture, quick: None) -> None:
    run_recipe(family, tmp_path, capsys)


def test_a_student_reloads_in_a_fresh_process(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Gemma 2 ends in its own class: a process that imports the package, and nothing of this one, agrees with it."""
    run_recipe("gemma2", tmp_path, capsys)


def run_recipe(family: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One family's recipe and what it must leave."""
    expected = FAMILIES[family][0]
    words = [f"recipe={write_recipe(family, tmp_path)}", "device=cpu", f"output_dir={tmp_path}/out"]
    assert main(["recover", *words, "dry_run=true"]) == 0
    plan = capsys.readouterr().out
    assert f"export       {expected}" in plan and ("prediction layer" in plan) == (family == "mimo")

    assert main(["recover", *words]) == 0
    printed = capsys.readouterr().out
    assert ("the student's own class" in printed) == (expected != "deepseek_v3")
    assert ("prediction layer(s) of the source" in printed) == (family == "mimo")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["export"]["format"] == expected and report["export"]["max_abs_logprob_diff"] < 1e-3
    notes = json.loads((tmp_path / "out" / "exported" / "transmla.json").read_text())["notes"]
    assert report["export"]["notes"] == notes and any("biases" in note for note in notes) == (family == "mimo")
    for note in notes:  # in the plan, the log and the report
        assert note in plan and note in printed and note in (tmp_path / "out" / "report.md").read_text()
    config = json.loads((tmp_path / "out" / "exported" / "config.json").read_text())
    assert config["rope_theta"] == (GEMMA3_ROPE["full_attention"]["rope_theta"] if "gemma3" in family else 1e4)
    quality = {name: content["sample_heldout"] for name, content in report["quality"].items()}
    assert quality["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert quality["recovered"]["kl"] < quality["converted"]["kl"]
    assert quality["exported"]["kl"] == pytest.approx(quality["recovered"]["kl"], abs=1e-4)
    errors = report["key_regression_error"]
    assert (errors is not None) == (family in ("qwen3", "gemma3_text"))
    if errors:
        assert len(errors) == 2 and all(0 < error < 1 for error in errors) and "no linear map explains" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "exported")
    assert model.config.model_type == expected
    if "window" in family:
        assert model.config.sliding_window == 16

    if expected != "deepseek_v3":
        assert main(["recover", *words, "export.format=deepseek_v3", "dry_run=true"]) == 2
        assert "export.format" in capsys.readouterr().err


def test_experts_become_stock_behind_recovery(tmp_path: Path, capsys: pytest.CaptureFixture, quick: None) -> None:
    """Both stages train, the second all weights; the shift that waits beside the students is still right."""
    source = make_leaning_mixtral(tmp_path / "source")
    stages = ["recover.0.tokens=1024", "recover.1.tokens=1024", "evaluate.max_new_tokens=4"]
    words = ["recipe=debug", f"model.source={source}", "~model.config", "convert.router=stock", *stages, "device=cpu"]
    assert main(["recover", *words, f"output_dir={tmp_path}/out"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "by a sigmoid" in line)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["export"]["format"] == "deepseek_v3" and report["export"]["max_abs_logprob_diff"] < 1e-4
    assert len(report["router_error"]) == 2 and max(layer["mean"]["float32"] for layer in report["router_error"]) < 1e-6
    said = line.removeprefix("[convert] router: ")
    for page in (tmp_path / "out" / "report.md", tmp_path / "out" / "exported" / "README.md"):
        assert f"Experts: {said}." in page.read_text()
    quality = {name: content["sample_heldout"]["kl"] for name, content in report["quality"].items()}
    assert quality["exported"] == pytest.approx(quality["recovered"], abs=1e-5) and quality["recovered"] > 0
    config = json.loads((tmp_path / "out" / "exported" / "config.json").read_text())
    facts = {"scoring_func": "softmax", "topk_method": "greedy", "moe_router_dtype": "float32", "router_fp32": True}
    assert facts.items() <= config.items() and config["first_k_dense_replace"] == 0


def test_perplexity_has_the_final_cap(tmp_path: Path) -> None:
    """What evaluation measures from hidden states is the model's own loss, cap and all."""
    from tests.conftest import tiny_model
    from transmla.measure.perplexity import compare, final_hidden

    model = tiny_model("gemma2", **GEMMA2)
    tokens = torch.randint(1, 97, (2, 20))
    hidden = final_hidden(model, tokens, 1, "test")
    head = model.get_output_embeddings().weight.detach()
    quality = compare(tokens, hidden, head, hidden, head, model.config.final_logit_softcapping)
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.exp()
    assert quality.perplexity == pytest.approx(float(expected), rel=1e-4)
