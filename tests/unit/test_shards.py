"""Weights in shards: losses and weights of one process, parts of the right size, checkpoints that resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.unit import test_recover
from tests.unit.test_recover import losses, make_trainer
from transmla.errors import RecipeError
from transmla.recipe.launch_file import load_whole
from transmla.recover.checkpoints import last_checkpoint
from transmla.recover.stage import run_stage

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVED = 10, 4

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "DS_ACCELERATOR": "cpu"}
LAYOUTS: dict[str, dict[str, str]] = {
    "fsdp2": FSDP2,
    "zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
SHARDED = ["fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "layerwise": ("layerwise", {}, {}),
    "layerwise, own stream": ("layerwise", {"stream": "student", "hidden": 0.5}, {}),
    "layerwise, logits": ("layerwise", {"hidden": 0.5, "logits": 0.3}, {}),
    "distill": ("distill", {}, {}),
    "distill, attention": ("distill", {"train": "attention", "cross_entropy": 0.2}, {}),
    "distill, recomputed": ("distill", {}, {"gradient_checkpointing": True}),
    "distill, adapters": ("distill", {"train": "lora", "lora": {"r": 4}}, {}),
    "two latents, adapters": ("distill", {"train": "lora", "lora": {"r": 4}}, {"convert": {"latent_heads": 2}}),
    "two tied latents": ("layerwise", {}, {"convert": {"latent_heads": 2, "tied": True}}),
    "sft": ("sft", {"relative_learning_rate": True}, {"learning_rate": 0.01}),
}


class Killed(BaseException):
    pass


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVED + 1:
            raise Killed


class Parts(TrainerCallback):
    """Type and bytes of what a process keeps of two models, when training has begun."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.found = trainer, {}

    def on_step_end(self, args, state, control, **kwargs):
        for name, model in (("student", self.trainer.student), ("teacher", self.trainer.teacher)):
            if model is not None:
                values = [_part(value) for value in model.parameters()]
                self.found[name] = (
                    sorted({kind for kind, _, _ in values}),
                    *(sum(v[i] for v in values) for i in (1, 2)),
                )


def _part(value: torch.nn.Parameter) -> tuple[str, int, int]:
    if hasattr(value, "ds_id"):
        return "DeepSpeed", value.ds_tensor.nbytes, value.ds_numel * value.element_size()
    if hasattr(value, "to_local"):
        return "DTensor", value.to_local().nbytes, value.nbytes
    return "whole", value.nbytes, value.nbytes


def trainer_of(case: str, folder: Path, **trainer: Any):
    load_whole()
    kind, stage, keys = CASES[case]
    processes = int(os.environ["WORLD_SIZE"])
    own = folder / os.environ["RANK"]  # two processes that write one tokenizer would read half of it
    defaults = dict(max_grad_norm=0.5, save_strategy="no")
    accumulate = 4 // processes
    made = make_trainer(
        kind,
        own,
        steps=STEPS,
        batch=2,
        accumulate=accumulate,
        processes=processes,
        stage=stage,
        **defaults | keys | trainer,
    )
    made.args.output_dir = str(folder / "checkpoints")
    return made


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.student.state_dict().items()}


def compute(folder: Path) -> None:
    """Every case once, from beginning to end."""
    for case in CASES:
        trainer = trainer_of(case, folder / case)
        parts = Parts(trainer)
        trainer.add_callback(parts)
        run_stage(trainer, torch.float32)
        if trainer.is_world_process_zero():
            found = {"losses": losses(trainer), "parts": parts.found, "weights": weights(trainer)}
            torch.save(found | {"class": type(trainer.student).__name__}, folder / f"{case}.pt")
        trainer.accelerator.wait_for_everyone()


def resume(folder: Path) -> None:
    """Two cases, killed after a checkpoint and gone on with; that of one is left for another number of processes."""
    for case in ("distill", "distill, adapters"):
        stopped = trainer_of(case, folder / case, save_strategy="steps", save_steps=SAVED)
        stopped.add_callback(Kill())
        with pytest.raises(Killed):
            stopped.train()
        stopped.accelerator.wait_for_everyone()
        go_on(folder, case)
    if "ACCELERATE_USE_FSDP" in os.environ:
        refuse_a_full_disk(folder)


def refuse_a_full_disk(folder: Path) -> None:
    """One process cannot write its part: all end with its reason, and there is no checkpoint."""
    trainer = trainer_of("sft", folder / "full", save_strategy="steps", save_steps=2)

    def write_data(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", write_data)
        with pytest.raises(RecipeError, match="process 1: .*No space left"):
            trainer.train()
    assert last_checkpoint(folder / "full" / "checkpoints") is None


def go_on(folder: Path, case: str) -> None:
    trainer = trainer_of(case, folder / case)
    found = run_stage(trainer, torch.float32, last_checkpoint(folder / case / "checkpoints"))
    assert found["resumed_from"].endswith(f"checkpoint-{SAVED}")
    if trainer.is_world_process_zero():
        torch.save({"losses": losses(trainer), "weights": weights(trainer)}, folder / f"{case}.resumed.pt")
    trainer.accelerator.wait_for_everyone()


def launch(processes: int, what: str, folder: Path, layout: str | None) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"),
            *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"),
            *("-m", "tests.unit.test_shards", what, str(folder)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (LAYOUTS[layout] if layout else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """A folder of results by layout, each computed when it is first asked for; `one`: of one process without shards."""
    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout)
            if layout == "one":
                launch(1, "compute", made[layout], None)
            else:
                launch(2, "compute", made[layout], layout)
        return made[layout]

    return get


@pytest.mark.parametrize("layout", SHARDED)
def test_ten_losses_and_the_weights_are_those_of_one_process(layout: str, folders) -> None:
    for case in CASES:
        one, own = (torch.load(folders(name) / f"{case}.pt") for name in ("one", layout))
        assert len(one["losses"]) == STEPS
        torch.testing.assert_close(own["losses"], one["losses"], rtol=1e-5, atol=1e-7, msg=case)
        assert own["class"] == one["class"]
        assert set(own["weights"]) == set(one["weights"])
        for name, value in one["weights"].items():
            torch.testing.assert_close(own["weights"][name], value, rtol=1e-3, atol=2e-4, msg=f"{case}: {name}")


@pytest.mark.parametrize("layout", SHARDED)
def test_every_process_keeps_its_part(layout: str, folders) -> None:
    kinds = {"fsdp2": ["DTensor"], "zero2": ["whole"], "zero3": ["DeepSpeed"]}[layout]
    for case in CASES:
        for name, (found, own, whole) in torch.load(folders(layout) / f"{case}.pt")["parts"].items():
            assert found == kinds, (case, name)
            assert own == whole if layout == "zero2" else own <= 0.55 * whole, (case, name)


@pytest.mark.parametrize("layout", SHARDED)
def test_stopped_and_resumed_is_bitwise_the_unbroken_run(layout: str, folders, tmp_path) -> None:
    launch(2, "resume", tmp_path, layout)
    for case in ("distill", "distill, adapters"):
        straight, resumed = torch.load(folders(layout) / f"{case}.pt"), torch.load(tmp_path / f"{case}.resumed.pt")
        assert resumed["losses"] == straight["losses"], case
        for name, value in straight["weights"].items():
            assert torch.equal(resumed["weights"][name], value), (case, name)
    if layout == "fsdp2":
        launch(1, "go_on", tmp_path, layout)
        resumed = torch.load(tmp_path / "distill.resumed.pt")
        straight = torch.load(folders(layout) / "distill.pt")
        torch.testing.assert_close(resumed["losses"], straight["losses"], rtol=1e-5, atol=1e-7)


@pytest.mark.faults  # minutes long
def test_a_whole_recipe_by_its_launch_file(tmp_path) -> None:
    """`accelerate launch` with the shipped file, two processes: every stage, and the same report as of one."""
    reports = {}
    for name, words in (("cpu", []), ("fsdp2", ["--num_processes", "2"])):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "accelerate.commands.launch"),
                *("--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml"), *words),
                *(str(ROOT / "recover.py"), "recipe=debug", "device=cpu", f"output_dir={tmp_path}/{name}"),
                "recover.0.trainer.per_device_train_batch_size=" + ("2" if name == "cpu" else "1"),
                "recover.1.trainer.per_device_train_batch_size=" + ("2" if name == "cpu" else "1"),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        reports[name] = json.loads((tmp_path / name / "report.json").read_text())
    one, two = (reports[name]["quality"]["exported"]["sample_heldout"]["kl"] for name in ("cpu", "fsdp2"))
    assert two == pytest.approx(one, rel=1e-3)


if __name__ == "__main__":
    documents = test_recover.documents()
    test_recover.documents = lambda: documents * 8  # no epoch ends: what it has left over is another share of processes
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "go_on":
        go_on(folder, "distill")
    else:
        {"compute": compute, "resume": resume}[what](folder)
    torch.distributed.destroy_process_group()  # gloo's threads may abort a process that ends without it
