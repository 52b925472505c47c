"""The rows a trainer sees, and a teacher that reads each of them once."""

import ctypes
import json
import os

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from tests.conftest import tiny_model
from tests.unit.test_record import LENGTH, VOCAB, stage_of, text
from tests.unit.test_recover import documents, losses, make_trainer, tokenizer
from transmla.data import documents as documents_module
from transmla.data.labelled import TEACHER_ONLY
from transmla.data.mixture import load_mixture
from transmla.data.rows import PARALLEL, are_whole, token_rows, whole_rows
from transmla.errors import RecipeError
from transmla.recipe.stages import Distill
from transmla.recover.stage import build_trainer, trainer_config
from transmla.recover.teachers.kept import TeacherStates
from transmla.recover.teachers.shards import data_digest
from transmla.recover.teachers.top_k import packed_trainer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.mark.parametrize(
    "trainer", [{}, {"packing_strategy": "wrapped"}, {"packing": False}], ids=["split", "wrapped", "padded"]
)
def test_token_rows_are_trls_own(trainer: dict, tmp_path, words) -> None:
    config = trainer_config(stage_of(**trainer), tmp_path, seed=3, device="cpu", dtype=torch.float32, processes=1)
    texts = text()["text"]
    data = Dataset.from_dict({"text": [texts[0] + words.eos_token, *texts[1:]]})  # one has its end already
    made = token_rows(data, words, config)
    assert set(made.column_names) == {"input_ids", "labels"}
    sets = [
        SFTTrainer(
            model=tiny_model(vocab_size=VOCAB), args=config, train_dataset=rows, processing_class=words
        ).train_dataset
        for rows in (data, made)
    ]
    columns = ["input_ids", "labels"]
    assert sets[0].select_columns(columns).to_list() == sets[1].select_columns(columns).to_list()
    assert len(sets[0]) > 20


@pytest.mark.parametrize("trainer", [{}, {"completion_only_loss": False}, {"packing": False}])
def test_prompts_and_completions_are_trls_own(trainer: dict, tmp_path, words) -> None:
    config = trainer_config(stage_of(**trainer), tmp_path, seed=3, device="cpu", dtype=torch.float32, processes=1)
    lines = text()["text"]
    ends = [words.eos_token, *[""] * (len(lines) - 1)]  # one has its end already
    data = Dataset.from_dict(
        {"prompt": lines, "completion": [line[::-1] + end for line, end in zip(lines, ends, strict=True)]}
    )
    sets = [
        SFTTrainer(
            model=tiny_model(vocab_size=VOCAB), args=config, train_dataset=rows, processing_class=words
        ).train_dataset
        for rows in (data, token_rows(data, words, config))
    ]
    columns = ["input_ids", "labels"]
    assert sets[0].select_columns(columns).to_list() == sets[1].select_columns(columns).to_list()
    assert -100 in sum(sets[0]["labels"], []) or "completion_only_loss" in trainer


def test_token_ids_stay_as_they_are(tmp_path, words) -> None:
    config = trainer_config(stage_of(), tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    made = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    assert token_rows(made, words, config) is made


def test_another_end_token(tmp_path, words) -> None:
    named = trainer_config(stage_of(eos_token="a"), tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    assert {row[-1] for row in token_rows(text(), words, named)["input_ids"]} == {words("a")["input_ids"][0]}
    wrong = trainer_config(stage_of(eos_token="<s>"), tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    with pytest.raises(RecipeError, match="recover.3.trainer.eos_token: <s> is no token"):
        token_rows(text(), words, wrong, key="recover.3")


def test_wrapped_rows_are_of_one_length(tmp_path, words) -> None:
    stage = stage_of(packing_strategy="wrapped")
    config = trainer_config(stage, tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    trainer = build_trainer(stage, *(tiny_model(vocab_size=VOCAB) for _ in range(2)), words, config, text(), scales=[])
    tokens = sum(len(words(line)["input_ids"]) + 1 for line in text()["text"])
    assert tokens % LENGTH, "a short row is what this is about"
    assert [len(row) for row in trainer.train_dataset["input_ids"]] == [LENGTH] * (tokens // LENGTH)
    short = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    assert whole_rows(short, config) is short


def test_short_rows_are_joined_not_lost(tmp_path) -> None:
    stage = stage_of(packing_strategy="wrapped", max_length=4)
    config = trainer_config(stage, tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    ids = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10], [11, 12, 13], [14], [15, 16, 17]]
    data = Dataset.from_dict({"input_ids": ids, "labels": [[-token for token in row] for row in ids]})
    rows = whole_rows(data, config)
    assert rows["input_ids"] == [[1, 2, 3, 4], [7, 8, 9, 10], [5, 6, 11, 12], [13, 14, 15, 16]]  # 17 fills no row
    assert rows["labels"] == [[-token for token in row] for row in rows["input_ids"]]
    assert are_whole(rows, config) and not are_whole(data, config)
    other = trainer_config(stage_of(max_length=4), tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    assert whole_rows(data, other) is data


def test_a_recording_is_of_the_trainers_wrapped_rows(tmp_path, words) -> None:
    stage = stage_of(packing_strategy="wrapped")
    config = trainer_config(stage, tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    trainer = build_trainer(stage, *(tiny_model(vocab_size=VOCAB) for _ in range(2)), words, config, text(), scales=[])
    assert data_digest(packed_trainer(text(), words, config).train_dataset) == data_digest(trainer.train_dataset)


def test_tokenizers_work_in_parallel_after_a_map_on_several_processes(tmp_path, words, monkeypatch) -> None:
    """`datasets` switches them off in the process, and on again only where Python can see it."""
    config = trainer_config(stage_of(), tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    process = ctypes.CDLL(None)
    process.getenv.restype = ctypes.c_char_p
    for chosen in (None, "false"):
        monkeypatch.delenv(PARALLEL, raising=False)
        if chosen is not None:
            monkeypatch.setenv(PARALLEL, chosen)
        os.putenv(PARALLEL, "false")
        token_rows(text(), words, config)
        assert process.getenv(PARALLEL.encode()) == (None if chosen is None else b"false")


def test_tokens_of_synthetic_text_have_the_divergence_alone(tmp_path, words) -> None:
    """Of a mixture: labels say which, through trl's packing, and the loss is that of its two groups of tokens."""
    (tmp_path / "people.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text()["text"][:20]))
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"text": line.upper()}) + "\n" for line in text()["text"][20:])
    )
    (tmp_path / "own.yaml").write_text("{path: own.jsonl, columns: {text: text}, synthetic: true}")
    data = load_mixture([str(tmp_path / "people.jsonl"), str(tmp_path / "own.yaml")], "data", words, 0)
    stage = Distill(
        kind="distill",
        train="all",
        data=["unused"],
        tokens=64,
        cross_entropy=0.4,
        trainer=dict(max_length=LENGTH, packing_strategy="wrapped"),
    )
    config = trainer_config(stage, tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    student, teacher = (tiny_model(vocab_size=VOCAB) for _ in range(2))
    with torch.no_grad():
        student.model.embed_tokens.weight.mul_(1.1)
    trainer = build_trainer(stage, student, teacher, words, config, data, scales=[])
    batch = trainer.data_collator(list(trainer.train_dataset))
    ids, labels = batch["input_ids"], batch["labels"]
    upper = torch.tensor([["A" <= words.decode([token]) <= "Z" for token in row] for row in ids.tolist()])
    lower = torch.tensor([["a" <= words.decode([token]) <= "z" for token in row] for row in ids.tolist()])
    assert (labels[upper] == TEACHER_ONLY).all() and torch.equal(labels[lower], ids[lower])
    assert upper.sum() > 100 and lower.sum() > 100
    with torch.no_grad():
        log_q, log_p = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        entropy = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
        human = labels[:, 1:] >= 0
        wanted = torch.where(human, 0.6 * divergence + 0.4 * entropy, divergence).sum()
        found = trainer.objective(trainer.model, batch)
    assert int(found.tokens) == human.numel()
    assert float(found.total) == pytest.approx(float(wanted), rel=1e-5)
    every = stage.model_copy(update={"synthetic_cross_entropy": True})
    trainer = build_trainer(every, student, teacher, words, config, data, scales=[])
    assert trainer.train_dataset["labels"] == trainer.train_dataset["input_ids"]


def test_a_mixture_without_cross_entropy_marks_nothing(tmp_path, words) -> None:
    config = trainer_config(stage_of(), tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    data = text().add_column("synthetic", [True] * len(text()))
    plain, marked = token_rows(data, words, config), token_rows(data, words, config, mark_synthetic=True)
    assert plain.to_list() == token_rows(text(), words, config).to_list()
    assert set(sum(marked["labels"], [])) == {TEACHER_ONLY}
    assert data_digest(plain) == data_digest(marked)  # a recording is of the same tokens


def distill(folder, keep: bool, epochs: int, **trainer: object):
    """Rows of one length, in batches that an epoch ends with a rest of."""
    rows = sum(len(document) for document in documents()) // 24
    steps = -(-rows // 3) * epochs
    stage = {"keep_teacher": True} if keep else {}
    return make_trainer("distill", folder, steps=steps, batch=3, stage=stage, packing_strategy="wrapped", **trainer)


def test_a_kept_teacher_reads_every_row_once_and_changes_nothing(tmp_path) -> None:
    found, read = [], []
    for name, keep in (("read", False), ("kept", True)):
        trainer = distill(tmp_path / name, keep, epochs=3)
        calls = []
        handle = trainer.teacher.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        handle.remove()
        found.append((losses(trainer), [value.detach().clone() for value in trainer.model.parameters()]))
        read.append(len(calls))
    assert read[0] == len(found[0][0])
    # A batch of an epoch's end may join rows that were read with one that was not.
    assert len(trainer.train_dataset) / 3 <= read[1] < read[0] / 2
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


def test_states_of_a_row_are_its_own() -> None:
    kept = TeacherStates(5, 2, 3, dtype=torch.float32, device=torch.device("cpu"))
    states = torch.randn(5, 2, 3)
    assert torch.equal(kept([3, 0], lambda: states[[3, 0]]), states[[3, 0]])
    assert torch.equal(kept([0, 4], lambda: states[[0, 4]]), states[[0, 4]])  # one of them is new: computed again
    assert torch.equal(kept([4, 3, 0], lambda: pytest.fail("all of them were seen")), states[[4, 3, 0]])


def test_no_room_for_the_states_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1024, 2048))
    for device in ("cuda", "cpu"):
        with pytest.raises(RecipeError, match="keep_teacher.*GiB of the teacher's states"):
            TeacherStates(10**7, 2048, 576, dtype=torch.bfloat16, device=torch.device(device))
    TeacherStates(1, 2, 3, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(RecipeError, match="beside 1024.0 GiB of training"):
        TeacherStates(1, 2, 3, dtype=torch.float32, device=torch.device("cpu"), reserve=2**40)
    with pytest.raises(RecipeError, match="does not fill one row of 5000 tokens"):
        distill(tmp_path, keep=True, epochs=1, max_length=5000)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"teacher": "recorded"}, "on disk already"),
        ({"trainer": {"packing_strategy": "bfd_split"}}, "rows of one length"),
        ({"trainer": {"packing_strategy": "wrapped", "packing": False}}, "trainer.packing"),
        ({"trainer": {"packing_strategy": "wrapped", "padding_free": True}}, "trainer.padding_free"),
        ({"trainer": {"packing_strategy": "wrapped", "pad_to_multiple_of": 16}}, "trainer.pad_to_multiple_of"),
        ({"synthetic_cross_entropy": True}, "set cross_entropy"),
    ],
)
def test_a_kept_teacher_needs_rows_of_one_length(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distill(
            **{
                "kind": "distill",
                "data": ["x"],
                "tokens": 1,
                "keep_teacher": True,
                "trainer": {"packing_strategy": "wrapped"},
            }
            | fields
        )


@pytest.mark.parametrize(
    "batch, dropped, named", [(3, True, {}), (500, False, {}), (3, False, {"dataloader_drop_last": False})]
)
def test_compiled_stages_take_whole_batches_where_there_is_one(
    batch: int, dropped: bool, named: dict, tmp_path
) -> None:
    trainer = make_trainer(
        "distill", tmp_path, batch=batch, stage={"compile": True}, packing_strategy="wrapped", **named
    )
    assert trainer.args.dataloader_drop_last is dropped
    if named:
        return
    sizes = {len(batch["input_ids"]) for batch in trainer.get_train_dataloader()}
    assert sizes == ({3} if dropped else {len(trainer.train_dataset)})


def test_who_asks_for_one_document_waits_for_few(words, monkeypatch) -> None:
    texts = [f"text {number}" for number in range(1000)]
    asked: list[int] = []
    known = documents_module._token_ids

    def counted(given: list[str], special: bool, tokenizer):
        asked.append(len(given))
        return known(given, special, tokenizer)

    monkeypatch.setattr(documents_module, "_token_ids", counted)
    data = Dataset.from_dict({"text": texts})
    first = next(documents_module.documents(data, words))
    assert sum(asked) < 20
    found = list(documents_module.documents(data, words))
    assert found[0] == first and found == [words(text)["input_ids"] for text in texts]
    assert max(asked) == documents_module.ROWS
