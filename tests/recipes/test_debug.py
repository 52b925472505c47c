"""A whole recipe on a tiny model: what it leaves, what a second run does, what a failure leaves."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from tests.conftest import all_metadata as records
from transmla.cli import main

COMMAND = ["recover", "recipe=debug", "device=cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "debug"
    assert main([*COMMAND, f"output_dir={out}"]) == 0
    return out


def remade(capsys, out: Path, *overrides: str) -> list[str]:
    """Labels of the stages that a run with these overrides did not skip."""
    capsys.readouterr()
    assert main([*COMMAND, f"output_dir={out}", *overrides]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    return [line[1 : line.index("]")] for line in lines if line.endswith("...")]


def test_what_it_leaves(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["recipe"] == "debug"
    assert report["geometry"]["cached_values_source"] == 64
    assert report["geometry"]["cached_values_student"] == 32
    assert report["geometry"]["saving_percent"] == 50.0
    quality = {name: content["sample_heldout"] for name, content in report["quality"].items()}
    assert list(quality) == ["teacher", "converted", "recovered", "exported"]
    assert quality["teacher"]["kl"] == pytest.approx(0, abs=1e-6) and quality["teacher"]["top1"] == 1.0
    assert quality["recovered"]["kl"] < 0.9 * quality["converted"]["kl"]
    assert quality["exported"]["kl"] == pytest.approx(quality["recovered"]["kl"], abs=1e-4)
    assert quality["exported"]["perplexity"] == pytest.approx(quality["recovered"]["perplexity"], rel=1e-4)
    assert report["export"]["format"] == "deepseek_v3" and report["export"]["max_abs_logprob_diff"] < 1e-3
    assert [stage["name"] for stage in report["stages"]][:4] == [
        "convert",
        "recover.0 layerwise",
        "recover.1 distill",
        "export",
    ]
    assert all(stage["tokens"] > 0 for stage in report["stages"][:3])
    assert all(0 < stage["checkpoints"]["stalled_seconds"] < stage["seconds"] for stage in report["stages"][1:3])
    assert report["stages"][2]["checkpoints"]["count"] == 2 and "checkpoints" not in report["stages"][0]
    assert report["seed"] == 0 and set(report["versions"]) >= {"torch", "transformers", "trl"}
    for folder in ("converted", "recovered", "exported", "stages/0_layerwise"):
        assert (finished / folder / "recipe.yaml").is_file()
        assert list((finished / folder).glob("*.safetensors"))
    for figure in ("loss", "quality", "layers"):
        assert (finished / "figures" / f"{figure}.png").stat().st_size > 5000
    assert "| recovered |" in (finished / "report.md").read_text()
    assert not list(finished.rglob(".partial*")) and not (finished / "checkpoints").exists()


def test_the_export_is_stock(finished: Path) -> None:
    config = json.loads((finished / "exported" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and "auto_map" not in config
    assert config["first_k_dense_replace"] == config["num_hidden_layers"] == 2
    assert config["tie_word_embeddings"] is False and config["rms_norm_eps"] == 1e-6
    assert config["q_lora_rank"] is None and config["rope_interleave"] is True
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in (finished / "exported").iterdir()}


def test_training_changes_weights_alone(finished: Path) -> None:
    """trl and transformers write special tokens and `use_cache` into the configuration of what they train."""
    for name in ("config.json", "generation_config.json"):
        wanted = (finished / "converted" / name).read_bytes()
        for folder in ("stages/0_layerwise", "recovered"):
            assert (finished / folder / name).read_bytes() == wanted


def test_a_second_run_skips_everything(finished: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *args: pytest.fail("a model was loaded")
    )
    before = records(finished)
    assert remade(capsys, finished) == []
    assert records(finished) == before


def test_only_what_depends_on_a_change_runs_again(finished: Path, capsys) -> None:
    evaluations = [f"evaluate {name}" for name in ("teacher", "converted", "recovered", "exported")]
    assert remade(capsys, finished, "evaluate.tokens=768") == evaluations
    assert remade(capsys, finished, "evaluate.tokens=768", "export.layout=padded") == ["export", "evaluate exported"]
    assert (
        remade(capsys, finished, "evaluate.tokens=768", "export.layout=padded", "recover.1.trainer.logging_steps=3")
        == []
    )
    assert remade(capsys, finished, "evaluate.tokens=768", "export.layout=padded", "recover.1.temperature=2") == [
        "recover.1 distill",
        "export",
        "evaluate recovered",
        "evaluate exported",
    ]


def test_models_of_other_settings_are_left_out(finished: Path, tmp_path, capsys) -> None:
    """Evaluating under changed settings neither reports the old models nor marks their numbers as current."""
    out = tmp_path / "debug"
    shutil.copytree(finished, out)
    words = ["recipe=debug", "device=cpu", f"output_dir={out}", "convert.kv_lora_rank=16"]
    assert main(["evaluate", *words]) == 0
    assert "left out" in capsys.readouterr().out
    assert list(json.loads((out / "report.json").read_text())["quality"]) == ["teacher"]
    assert main(["recover", *words]) == 0
    labels = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[evaluate")]
    assert sum("unchanged" in line for line in labels) == 1  # the teacher's
    quality = json.loads((out / "report.json").read_text())["quality"]
    assert list(quality) == ["teacher", "converted", "recovered", "exported"]


def test_room_beside_what_is_replaced(finished: Path, capsys, monkeypatch, tmp_path) -> None:
    """Old models are there until the new ones are whole: what they take cannot be counted for the new ones."""
    shutil.copytree(finished, out := tmp_path / "debug")
    there = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    model = (out / "converted" / "model.safetensors").stat().st_size
    free = namedtuple("usage", "total used free")(there, 0, model // 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    words = [f"recover.{index}.trainer.save_strategy=no" for index in (0, 1)]
    assert main([*COMMAND, f"output_dir={out}", *words, "convert.refit=false", "seed=1"]) == 2
    assert "error: output_dir: " in capsys.readouterr().err


def test_a_failed_check_publishes_nothing(finished: Path, tmp_path, capsys) -> None:
    out = tmp_path / "debug"
    words = [*COMMAND, f"output_dir={out}", "recover=[]"]
    assert main([*words, "export.verify.tolerance=1e-7"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: export.verify: log-probabilities") and "nothing was published" in line
    assert (out / "converted" / "transmla.json").is_file()
    assert not (out / "exported").exists() and not list(out.glob(".partial*"))
    assert main(words) == 0
    assert (out / "exported" / "transmla.json").is_file()


def test_a_wrong_export_is_caught(finished: Path, tmp_path, monkeypatch, capsys) -> None:
    """The reload check is not a formality: a rope that stays half-split does not pass."""
    import torch

    monkeypatch.setattr("transmla.export.deepseek_weights.rope_slots", lambda source, target: torch.arange(source))
    assert main([*COMMAND, f"output_dir={tmp_path / 'debug'}", "recover=[]"]) == 2
    assert "nothing was published" in capsys.readouterr().err


def test_progress_goes_to_tensorboard(tmp_path) -> None:
    """The files outlive the stage's checkpoints, and hold loss, learning rate and tokens per second."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "debug"
    assert main([*COMMAND, f"output_dir={out}", "recover.0.trainer.report_to=tensorboard"]) == 0
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "train/tokens_per_second"} <= set(events.Tags()["scalars"])


def test_single_steps(tmp_path, capsys) -> None:
    words = ["recipe=debug", "device=cpu", f"output_dir={tmp_path}/debug", "recover=[]"]
    assert main(["export", *words]) == 2
    assert "export needs" in capsys.readouterr().err
    for verb in ("convert", "export", "verify", "evaluate"):
        assert main([verb, *words]) == 0
    assert "max |difference" in capsys.readouterr().out
    assert (tmp_path / "debug" / "report.md").is_file()


def test_a_lengthened_recipe_keeps_its_first_stages(tmp_path, capsys) -> None:
    import yaml

    from transmla.recipe.names import share

    tree = yaml.safe_load((share("recipes") / "debug.yaml").read_text())
    first = {**tree, "recover": tree["recover"][:1]}
    for name, content in (("short", first), ("long", tree)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    words = ["device=cpu", f"output_dir={tmp_path}/out"]
    assert main(["recover", f"recipe={tmp_path}/short.yaml", *words]) == 0
    capsys.readouterr()
    assert main(["recover", f"recipe={tmp_path}/long.yaml", *words]) == 0
    printed = capsys.readouterr().out
    assert "[recover.0 layerwise] unchanged" in printed and "[recover.1 distill] ..." in printed
    assert (tmp_path / "out" / "stages" / "0_layerwise" / "transmla.json").is_file()


def test_an_interrupted_stage_goes_on(tmp_path, monkeypatch) -> None:
    """Killed in the second stage; the same command resumes from its checkpoint and ends like an undisturbed run."""
    from transformers import Trainer

    class Killed(BaseException):
        pass

    out = tmp_path / "debug"
    original = Trainer.training_step
    steps = 0

    def dying(self, *args, **kwargs):
        nonlocal steps
        steps += type(self).__name__ == "DistillTrainer"
        if steps == 11:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dying)
    with pytest.raises(Killed):
        main([*COMMAND, f"output_dir={out}"])
    assert (out / "checkpoints" / "1_distill" / "checkpoint-4").is_dir()
    monkeypatch.setattr(Trainer, "training_step", original)
    assert main([*COMMAND, f"output_dir={out}"]) == 0
    record = records(out)["recovered"]
    assert record["resumed_from"].endswith("checkpoint-4")
    assert record["tokens"] == 6 * 4 * 128
