"""Checkpoints that a thread writes: training goes on meanwhile, errors come out, what is there is whole and enough."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.unit.test_recover import make_trainer
from tests.unit.test_stages import KillAtThree, Killed
from transmla.errors import RecipeError
from transmla.files import PARTIAL, listed_files, save_manifest
from transmla.recover import checkpoints
from transmla.recover.checkpoints import last_checkpoint
from transmla.recover.snapshot import HostMemory
from transmla.recover.stage import run_stage

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    "layerwise": ("layerwise", {}),
    "attention": ("distill", {"train": "attention"}),
    "all": ("distill", {"train": "all"}),
    "lora": ("distill", {"train": "lora", "lora": {"dropout": 0.2}}),
}


def assert_equal_weights(one, other) -> None:
    there = dict(other.named_parameters())
    assert len(there) > 0
    for name, value in one.named_parameters():
        assert torch.equal(value, there[name]), name


@pytest.mark.parametrize("name", STAGES)
def test_what_is_trained_is_kept_and_nothing_else(name: str, tmp_path) -> None:
    """Frozen weights are the student's that the stage began with."""
    kind, stage = STAGES[name]
    trainer = make_trainer(kind, tmp_path, steps=2, stage=stage)
    trainer.train()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None
    kept = load_file(checkpoint / "trained.safetensors")
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert kept.keys() == trained.keys() and all(torch.equal(kept[name], trained[name]) for name in kept)
    assert {name.split(".")[0] for name in listed_files(checkpoint)} <= {
        "trained",
        "optimizer",
        "optimizer_groups",
        "scheduler",
        "rng_state",
        "trainer_state",
    }


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
@pytest.mark.parametrize("name", STAGES)
def test_resumed_equals_straight(name: str, optimizer: str, tmp_path) -> None:
    """Bitwise, with moments as tensors, without any, and with numbers among them."""
    kind, stage = STAGES[name]
    options = dict(stage=stage, steps=4, save_steps=2, optim=optimizer)
    straight = make_trainer(kind, tmp_path / "straight", **options)
    run_stage(straight, torch.float32)
    stopped = make_trainer(kind, tmp_path / "stopped", **options)
    stopped.add_callback(KillAtThree())
    with pytest.raises(Killed):
        run_stage(stopped, torch.float32)
    resumed = make_trainer(kind, tmp_path / "stopped", **options)
    checkpoint = last_checkpoint(tmp_path / "stopped")
    assert run_stage(resumed, torch.float32, checkpoint)["resumed_from"].endswith("checkpoint-2")
    assert_equal_weights(straight.student, resumed.student)


class Watch(TrainerCallback):
    """What was there after every step; calls `do` after one of them."""

    def __init__(self, folder: Path, step: int, do) -> None:
        self.folder, self.step, self.do = folder, step, do
        self.there: dict[int, list[str]] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.there[state.global_step] = sorted(path.name for path in self.folder.glob("checkpoint-*"))
        self.weights[state.global_step] = {name: value.detach().clone() for name, value in model.named_parameters()}
        if state.global_step == self.step:
            self.do()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch) -> None:
    """The snapshot is of its own step, whatever is trained before it is on disk."""
    go, publish = threading.Event(), checkpoints.publish

    def held(*args) -> None:
        assert go.wait(60)
        publish(*args)

    monkeypatch.setattr(checkpoints, "publish", held)
    trainer = make_trainer("distill", tmp_path, steps=6, save_steps=3, learning_rate=1e-2)
    watch = Watch(tmp_path, 5, go.set)
    trainer.add_callback(watch)
    result = run_stage(trainer, torch.float32)
    assert watch.there == {step: [] for step in range(1, 6)} | {6: watch.there[6]}
    kept = load_file(tmp_path / "checkpoint-3" / "trained.safetensors")
    assert all(torch.equal(value, watch.weights[3][name]) for name, value in kept.items())
    assert not all(torch.equal(value, watch.weights[5][name]) for name, value in kept.items())
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6" and not (tmp_path / PARTIAL).exists()
    assert result["checkpoints"]["count"] == 2 and 0 < result["checkpoints"]["stalled_seconds"] < 60


@pytest.mark.parametrize(("number", "steps"), [(1, 8), (2, 4)], ids=["while it trains", "when it has trained"])
def test_a_full_disk_ends_training(number: int, steps: int, tmp_path, monkeypatch) -> None:
    """In one sentence; with the next checkpoint at the latest, or at the end; the checkpoint before stays."""
    calls = []

    def full(tensors, file) -> None:
        calls.append(file)
        if len(calls) > 2 * (number - 1):  # two files a checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file)

    monkeypatch.setattr(checkpoints, "save_file", full)
    trainer = make_trainer("layerwise", tmp_path, steps=steps, save_steps=2)
    with pytest.raises(RecipeError, match=r"^output_dir: no checkpoint can be written below .*: .*No space left"):
        run_stage(trainer, torch.float32)
    assert trainer.state.global_step <= 4
    expected = None if number == 1 else tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path) == expected


def test_a_full_disk_is_seen_by_the_snapshot(tmp_path, monkeypatch) -> None:
    def full(self, content) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RecipeError, match=r"^output_dir: no checkpoint can be written .*No space left"):
        make_trainer("layerwise", tmp_path, steps=4, save_steps=2).train()


def test_an_error_of_the_program_stays_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "save_manifest", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_trainer("layerwise", tmp_path, steps=2, save_steps=2).train()


def launch(*words: str, processes: int = 0) -> int:
    """This file as a program, on so many processes; its exit code."""
    several = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d"]
    several += ["--rdzv_endpoint=localhost:0"]
    command = [sys.executable, *(several if processes else []), "-m", "tests.unit.test_background_checkpoints", *words]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    print(done.stderr[-3000:])
    return done.returncode


SHORT = dict(steps=6, save_steps=2)


def test_killed_while_a_checkpoint_is_written(tmp_path) -> None:
    """By the thread itself, when the second checkpoint's weights are on disk and the first is whole."""
    assert launch("killed", str(tmp_path)) == 9
    assert (tmp_path / PARTIAL / "checkpoint-4" / "trained.safetensors").is_file()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint == tmp_path / "checkpoint-2"
    straight = make_trainer("distill", tmp_path / "straight", **SHORT)
    run_stage(straight, torch.float32)
    resumed = make_trainer("distill", tmp_path, **SHORT)
    run_stage(resumed, torch.float32, checkpoint)
    assert_equal_weights(straight.student, resumed.student)
    assert not (tmp_path / PARTIAL).exists()


def killed(folder: Path) -> None:
    files = []

    def dying(tensors, file) -> None:
        save_file(tensors, file)
        files.append(file)
        if len(files) == 3:
            os._exit(9)

    checkpoints.save_file = dying
    make_trainer("distill", folder, **SHORT).train()


def test_two_processes_resume(tmp_path) -> None:
    """Each from its own random numbers: dropout draws them."""
    assert launch("parallel", str(tmp_path), processes=2) == 0
    one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("straight", "resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    kept = listed_files(tmp_path / "stopped" / "checkpoint-4")
    assert {"rng_state_0.pth", "rng_state_1.pth", "trained.safetensors"} <= kept.keys()


def parallel(folder: Path) -> None:
    rank = os.environ["RANK"]
    kind, stage = STAGES["lora"]

    def made(name: str):
        trainer = make_trainer(kind, folder / f"{name}.{rank}", steps=4, processes=2, stage=stage, save_steps=2)
        trainer.args.output_dir = str(folder / name)  # one for both, unlike the tokenizer that each of them makes
        return trainer

    straight = made("straight")
    run_stage(straight, torch.float32)
    stopped = made("stopped")
    stopped.add_callback(KillAtThree())
    with pytest.raises(Killed):
        stopped.train()
    stopped.accelerator.wait_for_everyone()
    resumed = made("stopped")
    checkpoint = last_checkpoint(folder / "stopped")
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"
    run_stage(resumed, torch.float32, checkpoint)
    if rank == "0":
        for name, trainer in (("straight", straight), ("resumed", resumed)):
            torch.save(dict(trainer.student.named_parameters()), folder / f"{name}.pt")


def test_a_checkpoint_of_the_former_layout_is_refused(tmp_path) -> None:
    """Whole models by transformers: a stage would begin with the weights that it was given."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_bytes(b"content")
    save_manifest(folder)
    said: list[str] = []
    assert last_checkpoint(tmp_path, said.append) is None
    assert "it lacks the trained weights; training begins anew" in said[0]


CHANGES = {
    "it lacks": lambda kept, name: kept.pop(name),
    "it has .*, which is not trained": lambda kept, name: kept.update(other=kept[name].clone()),
    "is float32 .* instead of float32": lambda kept, name: kept.update({name: kept[name][:-1].clone()}),
    "is bfloat16 .* instead of float32": lambda kept, name: kept.update({name: kept[name].bfloat16()}),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_weights_that_are_not_the_stage_s_are_refused(reason: str, tmp_path) -> None:
    make_trainer("layerwise", tmp_path, steps=2).train()
    file = tmp_path / "checkpoint-2" / "trained.safetensors"
    kept = load_file(file)
    CHANGES[reason](kept, max(kept))
    save_file(kept, file)
    trainer = make_trainer("layerwise", tmp_path, steps=4)
    before = {name: value.detach().clone() for name, value in trainer.student.named_parameters()}
    with pytest.raises(RecipeError, match=rf"^output_dir: .*checkpoint-2 is not of what this stage trains: .*{reason}"):
        run_stage(trainer, torch.float32, tmp_path / "checkpoint-2")
    assert all(torch.equal(value, before[name]) for name, value in trainer.student.named_parameters())


def test_host_memory_is_used_again() -> None:
    memory = HostMemory()
    tensors = {"a": torch.randn(5, 3), "b": torch.tensor(2.0), "c": torch.randn(4, 6).bfloat16().T}
    first = memory.copies({"x": tensors, "y": {}})
    wanted = {name: value.clone() for name, value in tensors.items()}
    for value in tensors.values():
        value.zero_()
    assert first["y"] == {} and all(torch.equal(first["x"][name], wanted[name]) for name in wanted)
    second = memory.copies({"x": tensors})["x"]
    assert second["a"].data_ptr() == first["x"]["a"].data_ptr() and not second["a"].any()
    large = memory.copies({"x": {"a": torch.ones(1000)}})["x"]
    assert large["a"].sum() == 1000
    memory.release()
    assert large["a"].sum() == 1000  # held by who has it


if __name__ == "__main__":
    {"killed": killed, "parallel": parallel}[sys.argv[1]](Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
