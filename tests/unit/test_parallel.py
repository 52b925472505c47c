"""Two processes and one: the same global batch has the same loss and gives the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.unit.test_recover import PLAIN, losses, make_trainer
from transmla.cli import main
from transmla.recipe.names import share

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


CASES = [("layerwise", False), ("layerwise", True), ("distill", False), ("distill", True), ("sft", True)]


def train(kind: str, file: Path, processes: int, packing: bool) -> None:
    own = file.with_suffix(f".{os.environ['RANK']}")  # two processes that write one tokenizer would read half of it
    batch = 4 // processes
    trainer = make_trainer(
        kind, own, steps=STEPS, batch=batch, accumulate=2, processes=processes, packing=packing, **PLAIN
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    if trainer.is_world_process_zero():
        after = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
        change = torch.cat([(after[name] - value).detach().flatten() for name, value in before.items()])
        torch.save({"losses": losses(trainer), "change": change}, file)
    trainer.accelerator.wait_for_everyone()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of processes, a folder with every case's losses and change of weights; one launch does all."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"of_{processes}")
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={processes}",
                "--master_port=0",
                "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0",
                "-m",
                "tests.unit.test_parallel",
                str(folders[processes]),
                str(processes),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.mark.parametrize("kind, packing", CASES)
def test_two_processes_equal_one(kind: str, packing: bool, results: dict[int, Path]) -> None:
    one, two = (torch.load(results[processes] / f"{kind}_{packing}.pt") for processes in (1, 2))
    assert len(one["losses"]) == STEPS
    torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-5, atol=1e-7)
    assert (one["change"] - two["change"]).norm() < 1e-4 * one["change"].norm()


def test_a_whole_recipe_on_two_processes(tmp_path, capsys) -> None:
    """The first process converts, exports and evaluates, both train; nobody waits for ever, also where a part is
    there already; and one process finds the result of two current."""

    def launch(recipe: str) -> str:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node=2",
                "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0",
                str(ROOT / "recover.py"),
                f"recipe={recipe}",
                "device=cpu",
                f"output_dir={tmp_path}/out",
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    tree = yaml.safe_load((share("recipes") / "debug.yaml").read_text())
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(tree | {"name": "debug", "recover": tree["recover"][:1]}))
    launch(str(tmp_path / "short.yaml"))
    printed = launch("debug")
    assert "[recover.0 layerwise] unchanged" in printed and "[recover.1 distill] ..." in printed
    capsys.readouterr()
    assert main(["recover", "recipe=debug", "device=cpu", f"output_dir={tmp_path}/out"]) == 0
    assert "..." not in [line[-3:] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    quality = {name: content["sample_heldout"]["kl"] for name, content in report["quality"].items()}
    assert quality["recovered"] < quality["converted"]
    assert all(stage["tokens"] > 2500 for stage in report["stages"][1:3])


if __name__ == "__main__":
    for kind, packing in CASES:
        train(kind, Path(sys.argv[1]) / f"{kind}_{packing}.pt", int(sys.argv[2]), packing)
    torch.distributed.destroy_process_group()  # gloo's threads may abort a process that ends without it
