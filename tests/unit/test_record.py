"""Recorded teachers: the rows that training sees, in its order, with the teacher's own log-probabilities."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests.conftest import tiny_model
from tests.unit.test_recover import tokenizer
from transmla.cli import main
from transmla.data.rows import attach_rows, carry_rows
from transmla.errors import RecipeError
from transmla.recipe.stages import Distill
from transmla.recover.stage import build_trainer, trainer_config
from transmla.recover.teachers import top_k
from transmla.recover.teachers.shards import RecordedTeacher, decode, encode, read_index
from transmla.recover.teachers.top_k import packed_trainer, record_teacher, training_batches

LENGTH = 32
VOCAB = 260


def stage_of(tokens: int = 100_000, **trainer: object) -> Distill:
    fields = dict(max_length=LENGTH, per_device_train_batch_size=2, logging_steps=1, save_strategy="no")
    return Distill(
        kind="distill",
        train="all",
        data=["unused"],
        tokens=tokens,
        teacher="recorded",
        record={"top_k": 8},
        trainer=fields | trainer,
    )


def text(seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 50, (40,), generator=generator).tolist()
    letters = [bytes(torch.randint(97, 122, (size,), generator=generator).tolist()).decode() for size in sizes]
    return Dataset.from_dict({"text": letters})


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def make(folder: Path, words, stage: Distill, data: Dataset | None = None, seed: int = 0) -> dict:
    return record_teacher(
        folder,
        stage,
        text() if data is None else data,
        words,
        lambda: tiny_model(vocab_size=VOCAB),
        inputs={"settings": "s"},
        vocabulary=VOCAB,
        key="recover.0.record",
        seed=seed,
        device="cpu",
        dtype=torch.float32,
    )


def trainer_of(folder: Path, words, stage: Distill, seed: int = 0):
    config = trainer_config(stage, folder, seed=seed, device="cpu", dtype=torch.float32, processes=1)
    student, teacher = tiny_model(vocab_size=VOCAB), tiny_model(vocab_size=VOCAB)
    return build_trainer(stage, student, teacher, words, config, text(), scales=[])


@pytest.mark.parametrize("dtype,error", [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 0.0)])
def test_a_row_survives_the_disk(dtype: str, error: float) -> None:
    logits = torch.randn(300, 70_000) * 3
    logits[0, 69_999] = 80.0  # certain: its log-probability is 0, the others' are far below float16's smallest step
    logp, ids = logits.log_softmax(-1).topk(16)
    back_ids, back = decode(encode(ids, logp, dtype), dtype)
    assert torch.equal(back_ids, ids)
    assert ((back - logp).abs() <= error * logp.abs() + 1e-7 * (error > 0)).all()


def test_packed_rows_are_the_trainers_own(tmp_path, words) -> None:
    """trl's shuffle, split and packing around another model give the same rows in the same order."""
    stage = stage_of(tokens=8 * 2 * LENGTH)
    real = trainer_of(tmp_path / "real", words, stage, seed=3)
    config = trainer_config(stage, tmp_path / "other", seed=3, device="cpu", dtype=torch.float32, processes=1)
    other = packed_trainer(text(), words, config)
    assert len(real.train_dataset) > 20
    assert attach_rows(real.train_dataset).to_list() == other.train_dataset.to_list()

    seen = []
    carry_rows(real)
    original = real.training_step
    real.training_step = lambda model, inputs, *rest: (seen.append(inputs["row"]), original(model, inputs, *rest))[1]
    real.train()
    assert seen == [batch["row"] for batch in training_batches(other, 16)]
    assert len(seen) == 8 and sum(seen, []) != sorted(sum(seen, []))


@pytest.mark.parametrize("trainer", [{}, {"packing": False}], ids=["packed", "padded"])
def test_what_is_read_is_what_the_teacher_says(trainer: dict, tmp_path, words) -> None:
    """Entries follow the trainer's unmasked positions, whatever batch a row is in."""
    stage = stage_of(**trainer)
    made = make(tmp_path / "recorded", words, stage)
    recorded = RecordedTeacher(tmp_path / "recorded")
    real = trainer_of(tmp_path / "real", words, stage)
    recorded.check(words, real.train_dataset)
    carry_rows(real)
    recorded.check(words, real.train_dataset)
    assert made["rows"] == len(recorded) == len(real.train_dataset)
    batches = list(real.get_train_dataloader())
    examples = [real.train_dataset[row] for row in (5, 1, 9)]
    for batch in [*batches, real.data_collator(examples)]:
        ids, logp = recorded.rows(batch["row"])
        mask = batch["labels"][:, 1:] != -100
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        with torch.no_grad():
            expected = real.teacher(**inputs, use_cache=False).logits[:, :-1][mask].double().log_softmax(-1)
        assert ids.shape == logp.shape == (int(mask.sum()), 8)
        assert (expected.gather(1, ids) - logp).abs().max() < 5e-3  # float16 of numbers below 10
        assert (expected.topk(8).values - logp).abs().max() < 5e-3


def test_a_killed_recording_goes_on(tmp_path, words, monkeypatch) -> None:
    monkeypatch.setattr(top_k, "SHARD_POSITIONS", 200)
    make(tmp_path / "straight", words, stage_of())
    whole = read_index(tmp_path / "straight")
    assert len(whole["shards"]) >= 3

    class Killed(BaseException):
        pass

    passes = []
    original = top_k.top_log_probabilities

    def dying(*args):
        passes.append(args)
        if len(passes) == 7:
            raise Killed
        return original(*args)

    monkeypatch.setattr(top_k, "top_log_probabilities", dying)
    with pytest.raises(Killed):
        make(tmp_path / "killed", words, stage_of())
    done = [row for shard in read_index(tmp_path / "killed")["shards"] for row in shard["rows"]]
    assert 0 < len(done) < sum(len(shard["rows"]) for shard in whole["shards"])
    make(tmp_path / "killed", words, stage_of())
    assert read_index(tmp_path / "killed") == whole
    assert len(passes) == 7 + (sum(len(shard["rows"]) for shard in whole["shards"]) - len(done) + 1) // 2
    passes.clear()
    make(tmp_path / "killed", words, stage_of())
    assert not passes  # complete: no teacher is asked


def test_a_larger_budget_appends(tmp_path, words) -> None:
    small = make(tmp_path, words, stage_of(tokens=4 * LENGTH))
    large = make(tmp_path, words, stage_of(tokens=12 * LENGTH))
    assert (small["rows"], large["rows"]) == (4, 12)


def test_recordings_of_something_else_are_refused(tmp_path, words) -> None:
    make(tmp_path / "recorded", words, stage_of(tokens=4 * LENGTH))
    recorded = RecordedTeacher(tmp_path / "recorded")
    stage = stage_of()
    with pytest.raises(RecipeError, match="another packed data"):
        recorded.check(words, trainer_of(tmp_path / "seed", words, stage, seed=1).train_dataset)
    with pytest.raises(RecipeError, match="another top_k"):
        make(
            tmp_path / "recorded",
            words,
            stage.model_copy(update={"record": stage.record.model_copy(update={"top_k": 4})}),
        )
    missing = next(row for row in range(40) if row not in recorded._where)
    with pytest.raises(RecipeError, match=f"row {missing} is not in"):
        recorded.rows([missing])

    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(RecipeError, match="another vocabulary"):
        recorded.check(Other(), text())


def test_damage_is_noticed(tmp_path, words) -> None:
    make(tmp_path, words, stage_of(tokens=4 * LENGTH))
    (shard,) = tmp_path.glob("*.bin")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    recorded = RecordedTeacher(tmp_path)
    with pytest.raises(RecipeError, match="damaged"):
        recorded.rows([next(iter(recorded._where))])
    shard.write_bytes(content[:-1])
    with pytest.raises(RecipeError, match="cut off"):
        RecordedTeacher(tmp_path)


def test_only_temperature_one_is_recorded() -> None:
    with pytest.raises(ValueError, match="temperature 1 only"):
        Distill(kind="distill", data=["a"], tokens=1, teacher="recorded", temperature=2.0)


def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    """Training refuses before weights load until the recording is there, and again when the packing changes."""
    words = [
        "recipe=debug",
        "device=cpu",
        f"output_dir={tmp_path}/out",
        "recover.1.teacher=recorded",
        "recover.1.record.top_k=500",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.AutoModelForCausalLM.from_pretrained", lambda *args: pytest.fail("a model was loaded")
        )
        assert main(["recover", *words]) == 2
        assert "recover.1.record: no recording in" in capsys.readouterr().err
    assert main(["record", *words]) == 0
    assert "24 rows" in capsys.readouterr().out
    index = json.loads((tmp_path / "out" / "recorded" / "1" / "index.json").read_text())
    assert index["inputs"]["top_k"] == 260  # of a vocabulary of 260
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.AutoModelForCausalLM.from_pretrained", lambda *args: pytest.fail("a model was loaded")
        )
        assert main(["record", *words]) == 0
        assert main(["recover", *words, "recover.1.trainer.max_length=64"]) == 2
        assert "another settings" in capsys.readouterr().err
    assert main(["record", "recipe=debug", "device=cpu", f"output_dir={tmp_path}/out"]) == 2
    assert "no stage has teacher: recorded" in capsys.readouterr().err
