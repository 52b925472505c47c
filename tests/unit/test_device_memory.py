"""What a stage needs of each device by launch, whether it fits, and the ways out; hours; the cache of tokens."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from transmla.cli import main
from transmla.plan import device_memory, disk
from transmla.plan.device_memory import GIB, misfit
from transmla.plan.disk import CACHED, cache_bytes
from transmla.plan.hours import hours_of
from transmla.plan.launched import Launch, launch_of_environment
from transmla.plan.memory import Sizes, memory_by_part, step_memory, training_memory
from transmla.recipe.compose import load_recipe
from transmla.recipe.stages import AnyStage, Distill, Layerwise, Sft

CONFIG = LlamaConfig(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    vocab_size=152064,
    tie_word_embeddings=False,
)
SIZES = Sizes(
    source=7_615_616_512,
    student=7_853_488_384,
    attention=1_060_084_480,
    adapters={"attention": 10**6, "all": 2 * 10**6},
)
ALONE = Launch()
NAMES = ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE")


def stage(kind: type = Distill, **fields) -> AnyStage:
    trainer = {"max_length": 4096, "per_device_train_batch_size": 4} | fields.pop("trainer", {})
    return kind(kind=kind.__name__.lower(), data=["unused"], tokens=10**9, trainer=trainer, **fields)


def parts(one: AnyStage, layout: str = "whole", processes: int = 1, **fields) -> dict[str, int]:
    return memory_by_part(one, SIZES, CONFIG, torch.bfloat16, layout=layout, processes=processes, **fields)


SMALL_CONFIG = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    vocab_size=49152,
    tie_word_embeddings=True,
)
SMALL_SIZES = Sizes(source=134_515_008, student=138_385_728, attention=30_412_800, adapters={"attention": 107_520})


# Largest allocation of a process in ten (or six) steps on H200, PyTorch 2.11, nothing compiled: docs/experiments.md.
@pytest.mark.parametrize(
    "large, kind, train, layout, processes, gib",
    [
        (True, Distill, "attention", "whole", 1, 53.45),
        (True, Distill, "attention", "whole", 4, 57.41),
        (True, Distill, "all", "fsdp2", 4, 73.41),
        (True, Distill, "all", "zero3", 4, 67.04),
        (True, Distill, "all", "fsdp2", 2, 106.23),
        (True, Distill, "all", "zero3", 2, 102.26),
        (False, Distill, "all", "whole", 1, 5.34),
        (False, Distill, "attention", "whole", 1, 2.72),
        (False, Sft, "all", "whole", 1, 5.18),
        (False, Layerwise, "attention", "whole", 1, 1.52),
        (False, Distill, "all", "whole", 2, 5.86),
        (False, Distill, "attention", "fsdp2", 2, 2.55),
        (False, Distill, "all", "fsdp2", 2, 4.10),
        (False, Layerwise, "attention", "fsdp2", 2, 1.30),
        (False, Layerwise, "attention", "zero2", 2, 2.17),
        (False, Distill, "all", "zero2", 2, 5.58),
        (False, Layerwise, "attention", "zero3", 2, 2.41),
    ],
)
def test_estimates_are_what_was_measured(large, kind, train, layout, processes, gib) -> None:
    length, rows = (4096, 1) if large else (1024, 2)
    trainer = {"max_length": length, "per_device_train_batch_size": rows}
    one = stage(kind, train=train, compile=False, trainer=trainer)
    sizes, config = (SIZES, CONFIG) if large else (SMALL_SIZES, SMALL_CONFIG)
    estimate = memory_by_part(one, sizes, config, torch.bfloat16, layout=layout, processes=processes)
    assert sum(estimate.values()) / GIB == pytest.approx(gib, rel=0.1)


def test_one_device_holds_everything_once() -> None:
    found = parts(stage(train="all"))
    assert found["weights"] == 2 * (SIZES.source + SIZES.student) + 2 * SIZES.student
    assert found["gradients"] == 4 * SIZES.student and found["optimizer"] == 8 * SIZES.student
    assert found["gathered"] == 0
    assert training_memory(stage(train="all"), SIZES, CONFIG, torch.bfloat16) == sum(found.values())
    step = step_memory(stage(train="all"), SIZES, CONFIG, torch.bfloat16)
    assert step == sum(found.values()) - found["weights"]


def test_a_frozen_trunk_is_there_once() -> None:
    found = parts(stage(train="attention"))
    assert found["weights"] == 2 * SIZES.source + 4 * SIZES.attention
    assert parts(stage(Sft, train="attention"))["weights"] == 2 * SIZES.student + 2 * SIZES.attention
    lora = parts(stage(train="lora"))
    assert lora["gradients"] == 4 * 32 * 10**6
    assert lora["weights"] == 2 * (SIZES.source + SIZES.attention) + 4 * 32 * 10**6


def test_ddp_sends_copies_of_the_gradients() -> None:
    one, several = parts(stage(train="all")), parts(stage(train="all"), processes=4)
    assert several["gradients"] == 2 * one["gradients"]
    assert all(several[name] == one[name] for name in one if name != "gradients")


@pytest.mark.parametrize(
    "layout, divided", [("zero2", ["gradients"]), ("fsdp2", ["weights", "gradients", "optimizer"])]
)
def test_shards_are_a_share(layout: str, divided: list[str]) -> None:
    two, eight = (parts(stage(train="all"), layout, count) for count in (2, 8))
    for name in divided:
        assert two[name] == pytest.approx(4 * eight[name], rel=1e-6)
    for name in {"gathered", "activations", "logits"}:
        assert two[name] == eight[name]


def test_fsdp2_gathers_what_is_outside_the_layers() -> None:
    found, outside = parts(stage(train="all"), "fsdp2", 4), 2 * 152064 * 3584
    layer = (SIZES.student - outside) // 28
    assert found["weights"] == (2 * (SIZES.source + SIZES.student) + 2 * SIZES.student) // 4
    assert found["gathered"] == (4 + 2) * outside + 2 * 2 * layer + 4 * (outside + layer)


def test_zero_keeps_weights_in_float32_with_the_moments() -> None:
    zero2, zero3 = parts(stage(train="all"), "zero2", 4), parts(stage(train="all"), "zero3", 4)
    assert zero2["weights"] == 2 * (SIZES.source + SIZES.student) and zero3["weights"] == zero2["weights"] // 4
    assert zero2["optimizer"] == zero3["optimizer"] == 12 * SIZES.student // 4


def test_what_is_offloaded_is_not_on_the_device() -> None:
    found = parts(stage(train="all"), "zero3", 4, offloaded=("optimizer", "weights"))
    assert found["weights"] == found["gradients"] == found["optimizer"] == 0 and found["gathered"] > 0


def test_other_optimizers_keep_less() -> None:
    assert parts(stage(train="all", trainer={"optim": "adamw_bnb_8bit"}))["optimizer"] == 2 * SIZES.student
    assert parts(stage(train="all", trainer={"optim": "adamw_torch_fused"}))["optimizer"] == 8 * SIZES.student


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, Launch("whole", 8, 4)),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, Launch("fsdp2", 2)),
        ({"ACCELERATE_USE_FSDP": "false"}, Launch()),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, Launch("zero2")),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, Launch("zero3")),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            Launch("zero2", offloaded=("optimizer",)),
        ),
    ],
)
def test_the_launch_is_accelerates(variables, expected: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *NAMES,
        "FSDP_VERSION",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch_of_environment() == expected


def refusal(
    one: AnyStage, gib: float, monkeypatch: pytest.MonkeyPatch, launch: Launch = ALONE, device="cuda"
) -> str | None:
    monkeypatch.setattr(device_memory, "free_memory", lambda where: int(gib * GIB))
    return misfit(one, SIZES, CONFIG, torch.bfloat16, device, launch)


def test_models_are_whole_before_they_are_in_shards(monkeypatch) -> None:
    """15.2 GB of teacher and 15.7 GB of student, wherever their shards fit."""
    eight, small = Launch("fsdp2", 8, 8), stage(trainer={"max_length": 128, "per_device_train_batch_size": 1})
    assert refusal(small, 40, monkeypatch, eight) is None
    assert "loaded whole before they are put in shards, 28.8 GiB" in refusal(small, 25, monkeypatch, eight)
    assert refusal(small, 25, monkeypatch, Launch("zero2", 8, 8)) != refusal(small, 25, monkeypatch, eight)


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = stage(Layerwise)
    needed = training_memory(one, SIZES, CONFIG, torch.bfloat16) / GIB
    assert refusal(one, needed, monkeypatch) is None
    assert refusal(one, 0.91 * needed, monkeypatch) is None  # an estimate
    assert refusal(one, 0.89 * needed, monkeypatch) is not None


def test_the_cheapest_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_memory, "share", lambda folder: tmp_path)
    (tmp_path / "fsdp2.yaml").write_text("")
    text = refusal(stage(train="all"), 79.0, monkeypatch)
    assert text is not None and "79.0 GiB of cuda:0 are free" in text
    assert "weights 43.4, gradients 29.3, optimizer 58.5, activations" in text
    ways = text.partition("cheapest ways out: ")[2].split("; ")
    assert len(ways) == 3 and ways[0].startswith("accelerate_configs/fsdp2.yaml on ")
    assert "zero" not in text  # no such file here
    needed = [float(way.rpartition("(")[2].removesuffix(" GiB)")) for way in ways]
    assert all(size <= 79.0 for size in needed)


def test_a_smaller_batch_is_the_first_way(monkeypatch: pytest.MonkeyPatch) -> None:
    one = stage(train="attention", trainer={"per_device_train_batch_size": 8})
    half = stage(train="attention", trainer={"per_device_train_batch_size": 4})
    room = 1.01 * training_memory(half, SIZES, CONFIG, torch.bfloat16) / GIB
    text = refusal(one, room, monkeypatch)
    first = (text or "").partition("cheapest ways out: ")[2].split("; ")[0]
    assert first.startswith("trainer.per_device_train_batch_size=4, trainer.gradient_accumulation_steps=2 (")


def test_processes_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    one = stage(Layerwise)
    needed = training_memory(one, SIZES, CONFIG, torch.bfloat16) / GIB
    assert refusal(one, 1.5 * needed, monkeypatch, device="cpu") is None
    text = refusal(one, 1.5 * needed, monkeypatch, Launch("whole", 2, 2), device="cpu")
    assert text is not None and "for each of 2 processes" in text and "GPUs" not in text


def test_a_run_is_refused_before_weights_load_and_a_finished_one_is_not(tmp_path, monkeypatch, capsys, quick) -> None:
    words = ["recover", "recipe=debug", "device=cpu", f"output_dir={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr(device_memory, "free_memory", lambda where: 10**6)
        patch.setattr("transmla.run.context.load_source", lambda *args: pytest.fail("weights were loaded"))
        assert main(words) == 2
        line = capsys.readouterr().err.strip()
        assert (
            line.startswith("error: recover.0: it needs about 0.0 GiB")
            and "GiB of the machine's memory are free; " in line
        )
        assert main([*words, "dry_run=true"]) == 0
        assert "refused on this machine: recover.1: it needs about" in capsys.readouterr().out
    assert main(words) == 0
    monkeypatch.setattr(device_memory, "free_memory", lambda where: 10**6)
    assert main(words) == 0  # nothing is trained


def test_hours(tmp_path: Path) -> None:
    recipe = load_recipe("debug", [])
    assert hours_of(recipe, tmp_path, 1) == [None, None]
    rows = [{"stage": "recover.1 distill", "tokens a second": 10.0}, {"stage": "recover.0 layerwise", "skipped": "so"}]
    (tmp_path / "bench.json").write_text(json.dumps({"device": "a card", "stages": rows}))
    assert hours_of(recipe, tmp_path, 2) == [None, "2.6 minutes at 10 tokens/s per device (bench.json of a card)"]
    given = load_recipe("debug", ["tokens_per_second=0.5"])
    assert hours_of(given, tmp_path, 1)[0] == "3.4 hours at 0 tokens/s per device (as given)"
    (tmp_path / "bench.json").write_text("[1]")
    assert hours_of(recipe, tmp_path, 1) == [None, None]


def test_tokens_of_local_text_count_on_disk(tmp_path: Path, monkeypatch, capsys) -> None:
    file, other = tmp_path / "a.txt", tmp_path / "b.jsonl"
    file.write_text("x\n" * 5000)
    other.write_text(json.dumps({"text": "y"}) * 1)
    data = [f"recover.0.data=[{file}, {{name: {other}, rows: 1}}]", f"recover.1.data=[{file}]"]
    recipe = load_recipe("debug", data)
    assert cache_bytes(recipe) == int(CACHED * 10000)  # once, and nothing of what is cut
    monkeypatch.setattr(disk, "LITTLE", 0)
    monkeypatch.setattr(disk, "CACHED", 1e15)
    monkeypatch.setattr(disk, "cache_of_text", lambda: tmp_path / "cache")
    words = ["recover", "recipe=debug", "device=cpu", f"output_dir={tmp_path / 'out'}", *data]
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: recover.0.data: ")
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / "tokens.arrow").open("wb") as sparse:  # as much as is asked for is there already
        sparse.truncate(2**40)
    monkeypatch.setattr(disk, "CACHED", 2**40 / 20000)
    disk._check_cache(recipe, tmp_path / "out", 0)
