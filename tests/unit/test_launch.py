"""Launch files: what each asks for, and what it cannot be used for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from transmla.errors import RecipeError
from transmla.plan.checks import prepare
from transmla.plan.launch_checks import ELEMENTWISE
from transmla.recipe.compose import load_recipe
from transmla.recipe.launch_file import layout
from transmla.recipe.stages import Distill
from transmla.recover.origin import Origin

FILES = sorted((Path(__file__).resolve().parents[2] / "accelerate_configs").glob("*.yaml"))
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO2, ZERO3 = ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage} for stage in ("2", "3"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_launch_file_leaves_the_number_format_to_the_recipe_and_shards_by_its_name(file: Path, monkeypatch) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(file), "recover.py", "recipe=debug"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.mixed_precision == "no"
    env: dict[str, str] = {}
    if args.use_deepspeed:
        monkeypatch.setattr("accelerate.utils.launch.compare_versions", lambda *_: False)
        args.deepspeed_fields_from_accelerate_config = ""
        env = prepare_deepspeed_cmd_env(args)[1]
    elif args.multi_gpu or args.use_fsdp:
        env = prepare_multi_gpu_env(args)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    shown = file.stem.split("_")[0]
    assert layout() == (shown if shown in ("fsdp2", "zero2", "zero3") else "whole")
    assert env.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false") == "false"
    offload = env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    assert offload == ("cpu" if file.stem == "zero3_offload" else "none")
    assert len(yaml.safe_load(file.read_text())) >= 6


@pytest.mark.parametrize(
    "env, overrides, key, words",
    [
        (FSDP2 | {"FSDP_VERSION": "1"}, [], "launch", "fsdp2.yaml"),
        (ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, [], "launch", "zero2.yaml"),
        (ZERO3, ["recover.1.compile=true"], "recover.1.compile", "auto"),
        (FSDP2, ["+recover.1.trainer.optim=adafactor"], "recover.1.trainer.optim", "adamw_torch"),
        (ZERO2, ["+recover.1.trainer.optim=adafactor"], "recover.1.trainer.optim", "adamw_torch"),
        (
            FSDP2,
            ["+recover.1.keep_teacher=true", "+recover.1.trainer.packing_strategy=wrapped"],
            "recover.1.keep_teacher",
            "false",
        ),
        (ZERO3, ["dtype=bfloat16"], "dtype", "float32"),
    ],
)
def test_what_shards_do_not_have_is_refused_before_weights_load(env, overrides, key, words, monkeypatch, tmp_path):
    monkeypatch.setattr("transmla.plan.launch_checks.find_spec", lambda name: True)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError) as refused:
        prepare(load_recipe("debug", ["device=cpu", f"output_dir={tmp_path}/out", *overrides]))
    assert refused.value.key == key
    assert words in refused.value.problem


def test_a_missing_deepspeed_is_named(monkeypatch, tmp_path) -> None:
    for name, value in ZERO3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("transmla.plan.launch_checks.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install"):
        prepare(load_recipe("debug", ["device=cpu", f"output_dir={tmp_path}/out"]))


@pytest.mark.parametrize("env", [FSDP2, ZERO2], ids=["fsdp2", "zero2"])
def test_recipes_without_such_wishes_pass(env, monkeypatch, tmp_path) -> None:
    if env is ZERO2:
        pytest.importorskip("deepspeed")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    override = f"+recover.1.trainer.optim={ELEMENTWISE[1]}"
    assert prepare(load_recipe("debug", ["device=cpu", f"output_dir={tmp_path}/out", override])).recipe


def stage(accumulate: int) -> Distill:
    return Distill(kind="distill", data=["x"], tokens=10**6, trainer={"gradient_accumulation_steps": accumulate})


def test_another_number_of_processes_keeps_the_rows_of_a_step(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    origin = Origin(None, 4)
    origin.accumulation(stage(2), 8, tmp_path, "recover.0")
    assert origin.same_batches(stage(2), 8).trainer["gradient_accumulation_steps"] == 1
    assert origin.same_batches(stage(2), 1).trainer["gradient_accumulation_steps"] == 8
    assert origin.same_batches(stage(2), 4) == stage(2)
    with pytest.raises(RecipeError, match="8 micro-batches of a step cannot be shared out among 3"):
        origin.accumulation(stage(2), 3, tmp_path, "recover.0")


def test_checkpoints_of_deepspeed_want_as_many_processes(monkeypatch, tmp_path) -> None:
    for name, value in ZERO3.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="of 4 processes are no good for 2"):
        Origin(None, 4).accumulation(stage(2), 2, tmp_path, "recover.0")
