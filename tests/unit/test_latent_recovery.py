"""Several and tied latents in recovery: what is between the blocks is zero after every stage, whatever trained it."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import all_metadata
from tests.unit.test_checkpoints import Ended, SignalAtThree, ended  # noqa: F401  # a fixture
from tests.unit.test_recover import make_trainer
from transmla.cli import main
from transmla.export.deepseek_weights import export_state
from transmla.process.stopping import request
from transmla.recover.checkpoints import WEIGHTS, last_checkpoint
from transmla.recover.stage import run_stage

GLA = {"latent_heads": 2}
GTA = {"latent_heads": 2, "tied": True}
FORMS = pytest.mark.parametrize("form", [GLA, GTA], ids=["gla", "gta"])


def check_blocks(weights: dict[str, torch.Tensor], form: dict) -> None:
    """kv_b of a stock checkpoint with two latents of 12 for two heads each: zero where they have no share."""
    found = [value for name, value in weights.items() if name.endswith("kv_b_proj.weight")]
    assert len(found) == 2 and all(value.shape[1] == 24 for value in found)
    for value in found:
        first, second = value.chunk(2)
        assert torch.count_nonzero(first[:, 12:]) == torch.count_nonzero(second[:, :12]) == 0
        if "tied" in form:
            head = torch.cat((torch.eye(6, 12), torch.eye(12)))
            assert torch.equal(first[:, :12], head.repeat(2, 1)) and torch.equal(second[:, 12:], first[:, :12])
        else:
            assert first[:, :12].all() and second[:, 12:].all()


@FORMS
@pytest.mark.parametrize(
    "kind, stage, trainer",
    [
        ("layerwise", {}, {"optim": "adamw_torch", "weight_decay": 0.3}),
        ("layerwise", {"train": "lora", "lora": {"r": 16}}, {}),
        ("distill", {"train": "all", "trunk_learning_rate": 0.5}, {"weight_decay": 0.3}),
        ("distill", {"train": "lora", "lora": {"r": 4, "targets": "all"}}, {}),
        ("distill", {"train": "attention"}, {"optim": "adafactor"}),
        ("sft", {"train": "attention", "relative_learning_rate": True}, {"learning_rate": 0.01, "optim": "sgd"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stage_trains_the_blocks_alone(kind: str, stage: dict, trainer: dict, form: dict, tmp_path) -> None:
    made = make_trainer(kind, tmp_path, stage=stage, convert=form, steps=4, save_steps=2, **trainer)
    before = {name.replace(".base_layer", ""): value.clone() for name, value in made.student.state_dict().items()}
    run_stage(made, torch.float32)
    trained = load_file(last_checkpoint(tmp_path) / WEIGHTS)
    assert trained and not any(name.endswith("self_attn.kv_b_proj.weight") for name in trained)
    after = made.student.state_dict()
    assert after.keys() == {name for name in before if ".lora_" not in name}
    if "lora" in stage and form is GLA:
        assert any("kv_b_proj.1.lora_B" in name for name in trained)
    for name, value in after.items():
        if ".self_attn." in name:
            assert not torch.equal(value, before[name]), f"{name} was not trained"
    check_blocks(export_state(made.student, "compact", torch.float32), form)


@FORMS
def test_a_stopped_stage_goes_on(form: dict, tmp_path, ended) -> None:  # noqa: F811
    options = dict(steps=6, accumulate=2, stage={"train": "lora", "lora": {"dropout": 0.2, "r": 4}}, convert=form)
    straight = make_trainer("distill", tmp_path / "straight", **options)
    run_stage(straight, torch.float32)
    trainer = make_trainer("distill", tmp_path / "stopped", **options)
    trainer.add_callback(SignalAtThree())
    with pytest.raises(Ended):
        run_stage(trainer, torch.float32)
    request().number = 0
    again = make_trainer("distill", tmp_path / "stopped", **options)
    run_stage(again, torch.float32, last_checkpoint(tmp_path / "stopped"))
    for (name, one), other in zip(straight.student.named_parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other), name
    check_blocks(export_state(again.student, "compact", torch.float32), form)


@FORMS
def test_a_recipe(form: dict, quick, capsys, tmp_path) -> None:
    """Layer by layer and distilled with everything decaying: the stock checkpoint, its metadata, report and plan."""
    words = [f"convert.{key}={str(value).lower()}" for key, value in form.items()]
    words += ["recipe=debug", "device=cpu", "recover.1.trainer.weight_decay=0.2", f"output_dir={tmp_path}"]
    assert main(["recover", *words]) == 0
    check_blocks(load_file(tmp_path / "exported" / "model.safetensors"), form)
    metadata = all_metadata(tmp_path)
    blocks = dict(latent_heads=2, latent_size=12, heads_of_a_latent=2, shared_columns=0, tied="tied" in form)
    assert metadata["exported"]["kv_b_blocks"] == blocks and metadata["exported"]["format"] == "deepseek_v3"
    assert metadata["exported"]["max_abs_logprob_diff"] < 1e-4
    assert "| 2 | 32 | 32 | 20 |" in (tmp_path / "report.md").read_text()
    capsys.readouterr()
    assert main(["recover", *words, "dry_run=true"]) == 0
    plan = capsys.readouterr().out
    assert "2 of 12, each for 2 heads" in plan
    assert "of 2 32 -> 32 (20 where a rank keeps its own latents)" in plan
    assert main(["verify", str(tmp_path)]) == 0
