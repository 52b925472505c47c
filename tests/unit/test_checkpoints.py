"""Checkpoints that are damaged, and the end of a stage: every step is trained, none twice and none past the last."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.unit.test_files import DAMAGES
from tests.unit.test_recover import losses, make_trainer
from transmla.errors import RecipeError
from transmla.files import remove
from transmla.process.stopping import ask, request
from transmla.recover import last_step
from transmla.recover.checkpoints import last_checkpoint
from transmla.recover.configuration import unchanged_configuration
from transmla.recover.stage import run_stage


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer("layerwise", folder, steps=4, save_steps=2).train()
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path) -> Path:
    for number in (2, 4):
        shutil.copytree(saved / f"checkpoint-{number}", tmp_path / f"checkpoint-{number}")
    return tmp_path


FILES = ["trained.safetensors", "optimizer.safetensors", "optimizer_groups.pt", "scheduler.pt", "rng_state.pth"]
FILES += ["trainer_state.json", "manifest.json"]


@pytest.mark.parametrize("change", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_falls_back(name: str, change, checkpoints: Path) -> None:
    said: list[str] = []
    assert last_checkpoint(checkpoints, said.append) == checkpoints / "checkpoint-4" and not said
    change(checkpoints / "checkpoint-4" / name)
    assert last_checkpoint(checkpoints, said.append) == checkpoints / "checkpoint-2"
    assert name in said[0] and "goes on from checkpoint-2" in said[0]


def test_strays_and_emptied_folders_fall_back(checkpoints: Path) -> None:
    (checkpoints / "checkpoint-99").mkdir()
    (checkpoints / "checkpoint-best").mkdir()
    remove(checkpoints / "checkpoint-4")
    (checkpoints / "checkpoint-4").mkdir()
    said: list[str] = []
    assert last_checkpoint(checkpoints, said.append) == checkpoints / "checkpoint-2"
    assert len(said) == 2
    (checkpoints / "checkpoint-2" / "optimizer.safetensors").unlink()
    assert last_checkpoint(checkpoints, said.append) is None and "begins anew" in said[-1]


def test_a_checkpoint_without_an_optimizer_is_none(tmp_path) -> None:
    """transformers would go on from it with moments of zero."""
    trainer = make_trainer("layerwise", tmp_path, steps=2, save_steps=2)
    trainer.args.save_only_model = True  # which a recipe cannot say
    trainer.train()
    said: list[str] = []
    assert last_checkpoint(tmp_path, said.append) is None and "it lacks the optimizer" in said[0]


@pytest.mark.parametrize("stage", [{}, {"train": "lora"}, {"train": "all"}], ids=["attention", "lora", "all"])
def test_a_stage_killed_after_its_last_checkpoint(stage: dict, tmp_path) -> None:
    """The rate is constant and the steps end within an epoch: one step more would move the weights."""
    straight = make_trainer("distill", tmp_path, steps=5, save_steps=2, stage=stage)
    whole = run_stage(straight, torch.float32)
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name == "checkpoint-5"
    again = make_trainer("distill", tmp_path, steps=5, save_steps=2, stage=stage)
    again.training_step = lambda *args: pytest.fail("a step was trained")
    result = run_stage(again, torch.float32, checkpoint)
    assert result["tokens"] == whole["tokens"] > 0
    assert losses(again) == losses(straight) and len(losses(again)) == 5
    for (name, one), other in zip(straight.student.named_parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other) and not other.requires_grad, name


class SignalAtThree(TrainerCallback):
    """A signal within the third step."""

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            ask(signal.SIGTERM)


class Ended(BaseException):
    pass


@pytest.fixture
def ended(monkeypatch):
    """The process goes on where a signal would have ended it; what it would have said."""
    said = []

    def end(where: str) -> None:
        said.append(where)
        raise Ended

    monkeypatch.setattr(last_step, "end_after_step", end)
    yield said
    request().number, request().saving = 0, False


@pytest.mark.parametrize("saves", [{}, {"save_strategy": "no"}, {"enable_jit_checkpoint": True}], ids=str)
def test_a_stage_that_a_signal_stopped_goes_on(saves: dict, tmp_path, ended: list[str]) -> None:
    """To the last bit, dropout included."""
    options = dict(steps=6, accumulate=2, stage={"train": "lora", "lora": {"dropout": 0.2}})
    straight = make_trainer("distill", tmp_path / "straight", **options)
    run_stage(straight, torch.float32)
    trainer = make_trainer("distill", tmp_path / "stopped", **options, **saves)
    trainer.add_callback(SignalAtThree())
    with pytest.raises(Ended):
        run_stage(trainer, torch.float32, key="recover.7")
    assert ended == [" after step 3 of 6 of recover.7"]
    request().number = 0
    again = make_trainer("distill", tmp_path / "stopped", **options)
    result = run_stage(again, torch.float32, last_checkpoint(tmp_path / "stopped"))
    assert result["resumed_from"].endswith("checkpoint-3")
    for (name, one), other in zip(straight.student.named_parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")])
def test_want_of_memory_names_the_key(error: Exception, tmp_path, monkeypatch) -> None:
    trainer = make_trainer("distill", tmp_path, steps=2)

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(trainer, "training_step", fail)
    with pytest.raises(RecipeError, match=r"^recover.7.trainer.per_device_train_batch_size: out of memory"):
        run_stage(trainer, torch.float32, key="recover.7")


class Overflow(TrainerCallback):
    """A weight that becomes infinite in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == self.step - 1:
            with torch.no_grad():
                model.model.layers[1].self_attn.o_proj.weight[3, 3] = float("inf")


def test_a_loss_that_is_not_finite_is_refused(tmp_path) -> None:
    """When it is logged, not when all steps are done."""
    trainer = make_trainer("distill", tmp_path, steps=8)
    trainer.add_callback(Overflow(2))
    with pytest.raises(RecipeError, match=r"^recover.7: the loss is (nan|inf) at step 3; lower trainer.learning_rate"):
        run_stage(trainer, torch.float32, key="recover.7")


def test_weights_that_are_not_finite_are_refused(tmp_path) -> None:
    """The last step's have no loss of their own."""
    trainer = make_trainer("distill", tmp_path, steps=1)
    trainer.add_callback(Overflow(1))
    with pytest.raises(RecipeError, match=r"^recover.7: model.layers.1.self_attn.o_proj.weight is not finite"):
        run_stage(trainer, torch.float32, key="recover.7")


@pytest.mark.parametrize("kind", ["layerwise", "distill", "sft"])
def test_a_stage_leaves_the_configuration_alone(kind: str, tmp_path) -> None:
    """trl takes its tokenizer's padding, transformers its end token, whatever the source's are."""
    trainer = make_trainer(kind, tmp_path / "first", steps=1)
    student = trainer.student
    student.config.pad_token_id = student.generation_config.pad_token_id = None
    student.config.eos_token_id = student.generation_config.eos_token_id = [5, 9]
    before = student.config.to_dict(), student.generation_config.to_dict()
    with unchanged_configuration(student, trainer.teacher, None):
        again = make_trainer(kind, tmp_path / "second", steps=1, student=student)
        run_stage(again, torch.float32)
        assert (student.config.to_dict(), student.generation_config.to_dict()) != before
    assert (student.config.to_dict(), student.generation_config.to_dict()) == before
