"""Artifacts and checkpoints that are there whole or not at all."""

import os
from pathlib import Path

import pytest

from tests.unit.test_files import DAMAGES
from transmla.errors import RecipeError
from transmla.files import MANIFEST
from transmla.run.artifacts import METADATA, Condition, condition, is_current, publishing, read_metadata, require
from transmla.run.fingerprints import fingerprint


def test_an_artifact_appears_whole(tmp_path) -> None:
    target = tmp_path / "thing"
    with publishing(target, {"fingerprint": "a"}) as scratch:
        (scratch / "weights").write_text("1")
        assert not target.exists()
    assert is_current(target, "a") and not is_current(target, "b")
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


@pytest.mark.parametrize("change", DAMAGES)
@pytest.mark.parametrize("name", ["weights", METADATA, MANIFEST])
def test_a_damaged_artifact_is_not_current(name: str, change, tmp_path) -> None:
    with publishing(tmp_path / "thing", {"fingerprint": "a" * 64}) as scratch:
        (scratch / "weights").write_text("1234567890")
    change(tmp_path / "thing" / name)
    found = condition(tmp_path / "thing", "a" * 64)
    assert not found.current and found.damage
    with pytest.raises(RecipeError, match="export needs .*thing, which is damaged: .*; run recover.py first"):
        require(tmp_path / "thing", "a" * 64, "export", "recover.py")


def test_nothing_and_something_else_are_no_damage(tmp_path) -> None:
    assert condition(tmp_path / "nothing", "a") == Condition(False)
    (tmp_path / "emptied").mkdir()
    assert condition(tmp_path / "emptied", "a") == Condition(False)
    with publishing(tmp_path / "other", {"fingerprint": "b"}) as scratch:
        (scratch / "weights").write_text("1")
    assert condition(tmp_path / "other", "a") == Condition(False)


def test_a_failure_leaves_the_earlier_artifact(tmp_path) -> None:
    target = tmp_path / "thing"
    with publishing(target, {"fingerprint": "a"}) as scratch:
        (scratch / "weights").write_text("1")
    with pytest.raises(RuntimeError), publishing(target, {"fingerprint": "b"}) as scratch:
        (scratch / "weights").write_text("2")
        raise RuntimeError
    assert (target / "weights").read_text() == "1"
    assert read_metadata(target) == {"fingerprint": "a"}
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_fingerprints_see_every_setting() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


STEPS = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "state", "replace")


@pytest.mark.parametrize("where", STEPS)
def test_a_save_that_is_killed_leaves_no_checkpoint(where: str, tmp_path, monkeypatch) -> None:
    """At whatever point the save dies, the newest checkpoint is the whole one before."""
    from transformers import TrainerState

    from tests.unit.test_recover import make_trainer
    from transmla.recover.checkpoints import last_checkpoint
    from transmla.recover.layerwise import LayerwiseTrainer

    class Killed(BaseException):
        pass

    saves = 0
    owners = {"replace": os, "state": TrainerState}
    names = {"replace": "replace", "state": "save_to_json"}
    owner, name = owners.get(where, LayerwiseTrainer), names.get(where, where)
    original = getattr(owner, name)

    def dying(*args, **kwargs):
        nonlocal saves
        if where != "replace" or Path(args[0]).name.startswith("checkpoint-"):
            saves += 1
            if saves == 2:
                raise Killed
        return original(*args, **kwargs)

    trainer = make_trainer("layerwise", tmp_path, steps=6, save_steps=2)
    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(Killed):
        trainer.train()
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-2"
    assert (tmp_path / "checkpoint-2" / "optimizer.safetensors").is_file()
