"""A large corpus: what is held in memory, what is done once, and where a resumed training goes on."""

import json
import os
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pyarrow as arrow
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback

from tests.unit.test_data import Letters
from tests.unit.test_record import stage_of
from tests.unit.test_recover import make_trainer, tokenizer
from transmla.data.inspection import check_dataset
from transmla.data.labelled import Labeller
from transmla.data.loading import load_one
from transmla.data.mixture import load_mixture
from transmla.data.rows import config_of_rows, main_first, token_rows, whole_rows
from transmla.errors import RecipeError
from transmla.recipe.data_lists import Part
from transmla.recover.checkpoints import last_checkpoint
from transmla.recover.stage import run_stage, trainer_config

ROOT = Path(__file__).resolve().parents[2]
MB = 1_000_000
POOLS = []  # a pool must outlive what was allocated from it


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@contextmanager
def at_most(python: int, arrow_bytes: int):
    """Peaks of what Python and Arrow allocate meanwhile; files that are mapped into memory do not count."""
    usual = arrow.default_memory_pool()
    pool = arrow.proxy_memory_pool(usual)
    POOLS.append(pool)
    arrow.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        arrow.set_memory_pool(usual)
    assert peak < python and pool.max_memory() < arrow_bytes, (peak, pool.max_memory())


def corpus(folder: Path, size: int, separator: str = "<|doc|>") -> Path:
    """A definition of a text file with documents of 10 kB; one letter outside Latin-1 widens a string of all."""
    line = "The sea was calm, and nothing moved on it but a gull \u2014 a small one.\n"
    document = line * (10_000 // len(line))
    with (folder / "corpus.txt").open("w") as file:
        for number in range(size // len(document)):
            file.write(f"{number} {document}{separator}\n")
    definition = folder / "corpus.yaml"
    definition.write_text(f"path: corpus.txt\ncolumns: {{text: text}}\nseparator: '{separator}'\n")
    return definition


def test_a_text_file_is_read_piece_by_piece(tmp_path) -> None:
    definition = str(corpus(tmp_path, 30 * MB))
    with at_most(25 * MB, 25 * MB):
        check_dataset(definition, "k", online=False)
        data = load_one(definition, "k")
    assert len(data) > 2900 and data[2900]["text"].startswith("2900 The sea")
    assert data[2900]["text"].endswith("a small one.")


@pytest.mark.parametrize("separator", ["<|doc|>", "\n\n", "aab", "x"])
def test_blocks_do_not_show(separator: str, tmp_path, monkeypatch) -> None:
    """Separators, line ends and letters of several bytes that lie across two blocks."""
    text = "\ufeffeins\r\nzw\u00f6lf<|doc|>drei\r\r\n\u20ac\U0001f600aaab x aabaab<|doc|><|doc|>\n\nlast<|doc"
    (tmp_path / "a.txt").write_bytes(text.encode())
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    wanted = [piece.strip() for piece in plain.split(separator) if piece.strip()]
    (tmp_path / "d.yaml").write_text(
        f"path: a.txt\ncolumns: {{text: text}}\nseparator: {json.dumps(separator)}\nabout: {separator!r} "
    )
    for size in (3, 4, 5, 7, 64):
        monkeypatch.setattr("transmla.data.reading.BLOCK", size)
        os.utime(tmp_path / "a.txt", ns=(size, size))  # or the first answer would be the cache's
        assert load_one(str(tmp_path / "d.yaml"), "k")["text"] == wanted


def test_the_line_of_a_fault_behind_a_block(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transmla.data.reading.BLOCK", 3)
    for fault, words in ((b"\xff", "line 3 is not UTF-8"), (b"\0", "line 3 has zero bytes"), (b"\xc3", "line 3 is")):
        (tmp_path / "a.txt").write_bytes(b"one\ntwo\nab" + fault)
        with pytest.raises(RecipeError, match=words):
            check_dataset(str(tmp_path / "a.txt"), "k", online=False)


def test_whole_rows_do_not_hold_the_tokens(tmp_path) -> None:
    config = trainer_config(
        stage_of(packing_strategy="wrapped", max_length=256),
        tmp_path,
        seed=3,
        device="cpu",
        dtype=torch.float32,
        processes=1,
    )
    row = {"input_ids": list(range(256)), "labels": list(range(256))}
    parts = {name: [values] * 20_000 + [values[:99]] * 20 for name, values in row.items()}
    data = Dataset.from_dict(parts).shuffle(seed=0)
    with at_most(20 * MB, 5 * MB):
        whole = whole_rows(data, config)
    assert len(whole) == 20_000 + 20 * 99 // 256 and whole[20_003]["input_ids"][:3] == [75, 76, 77]


def test_a_second_stage_does_not_tokenise_again(tmp_path, words, monkeypatch) -> None:
    data = load_one(str(corpus(tmp_path, 100_000)), "recover.0.data")
    config = trainer_config(stage_of(), tmp_path, seed=3, device="cpu", dtype=torch.float32, processes=1)
    first = token_rows(data, words, config, key="recover.0")
    monkeypatch.setattr(Labeller, "__call__", lambda *_: pytest.fail("tokenised again"))
    data = load_one(str(tmp_path / "corpus.yaml"), "recover.1.data")
    second = token_rows(data, words, config, key="recover.1", mark_synthetic=True)
    assert second._fingerprint == first._fingerprint and second[3] == first[3]


def test_rows_of_several_workers_are_those_of_one(tmp_path, words) -> None:
    rows, packed = {}, {}
    for count in (None, 2):
        (tmp_path / str(count)).mkdir()
        data = load_one(str(corpus(tmp_path / str(count), 60_000)), "k")
        stage = stage_of(dataset_num_proc=count)
        config = trainer_config(stage, tmp_path, seed=3, device="cpu", dtype=torch.float32, processes=1)
        rows[count] = token_rows(data, words, config).to_dict()
        packed[count] = config_of_rows(config).dataset_num_proc
    assert rows[None] == rows[2] and packed == {None: None, 2: None}
    chat = Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]] * 4})
    with pytest.raises(RecipeError, match="^recover.5.data: row 1: it is a conversation"):
        token_rows(chat, words, config, key="recover.5")


class Counting(Letters):
    """Counts how often it is asked, outside what names a file in the cache."""

    asked = 0

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        Counting.asked += texts != ["a"]
        return super().__call__(texts)


def test_lengths_of_a_mixture_are_counted_once(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": "b" * (1 + number % 7)}) for number in range(1000)))
    entries = [Part(name=f"{file}#train", weight=0.7), Part(name=f"{file}#test", weight=0.3, repeat=True)]
    first = load_mixture(entries, "recover.0.data", Counting(), 0)["text"]
    asked = Counting.asked
    assert asked > 0 and load_mixture(entries, "recover.1.data", Counting(), 0)["text"] == first
    assert Counting.asked == asked


def test_rows_of_a_hub_are_streamed_once(tmp_path, monkeypatch) -> None:
    asked = []

    def answer(**_: object):
        asked.append(1)
        return Dataset.from_dict({"text": [f"{tmp_path} {len(asked)}", "b", "c"]}).to_iterable_dataset()

    commit = SimpleNamespace(hash=str(tmp_path))
    monkeypatch.setattr("transmla.data.loading.load_dataset", answer)
    monkeypatch.setattr("transmla.data.loading.load_dataset_builder", lambda **_: commit)
    (tmp_path / "d.yaml").write_text("hub: org/set\nrows: 2\ncolumns: {text: text}\n")
    loaded = [load_one(str(tmp_path / "d.yaml"), f"recover.{stage}.data") for stage in (0, 1)]
    assert loaded[0]["text"] == loaded[1]["text"] == [f"{tmp_path} 1", "b"] and len(asked) == 1
    assert loaded[0].cache_files  # on disk: what is made of it can be kept too
    commit.hash = f"{tmp_path} moved"
    assert load_one(str(tmp_path / "d.yaml"), "k")["text"] == [f"{tmp_path} 2", "b"]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("stopped", [3, 7, 17])  # 8 steps an epoch: in the first, before its end, in the third
def test_a_resumed_training_sees_the_batches_of_an_unbroken_one(stopped: int, tmp_path) -> None:
    """And reads none of those that came before: the position is one in the order of rows."""

    def made(name: str) -> tuple:
        trainer = make_trainer("sft", tmp_path / name, steps=20, accumulate=2, packing=False, save_steps=1)
        trainer.train_dataset = trainer.train_dataset.select(range(32))
        seen: list = []
        collate = trainer.data_collator

        def noting(rows: list) -> dict:
            seen.append([row["input_ids"] for row in rows])
            return collate(rows)

        trainer.data_collator = noting
        return trainer, seen

    straight, wanted = made("straight")
    run_stage(straight, torch.float32)
    broken, _ = made("broken")
    broken.add_callback(StopAt(stopped))
    with pytest.raises(RecipeError, match=f"stopped at step {stopped} of 20"):
        run_stage(broken, torch.float32)
    resumed, found = made("broken")
    run_stage(resumed, torch.float32, last_checkpoint(tmp_path / "broken"))
    assert len(found) >= 2 * (20 - stopped) and found == wanted[2 * stopped :]
    assert wanted[:16] != wanted[16:32]  # epochs have orders of their own


def test_ranks_share(tmp_path, words) -> None:
    """The first process tokenises; the others read what it made, and do not wait for ever where it fails."""
    corpus(tmp_path, 100_000)
    words.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "-m", "tests.unit.test_corpus", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["tokenised"] > 0 and second["tokenised"] == 0
    assert first["rows"] == second["rows"] and first["failed"] and second["failed"]


def of_a_rank(folder: Path) -> None:
    from transformers import AutoTokenizer

    state = PartialState(cpu=True)
    tokenised = 0
    encode = Labeller.__call__

    def counting(self: Labeller, *batch) -> dict:
        nonlocal tokenised
        tokenised += 1
        return encode(self, *batch)

    Labeller.__call__ = counting
    with main_first():
        data = load_one(str(folder / "corpus.yaml"), "k")
    own = folder / str(state.process_index)
    config = trainer_config(stage_of(), own, seed=3, device="cpu", dtype=torch.float32, processes=2)
    rows = token_rows(data, AutoTokenizer.from_pretrained(folder / "tokenizer"), config)
    failed = False
    try:
        with main_first():
            raise RecipeError("k", "wrong")
    except RecipeError:
        failed = True
    found = {"tokenised": tokenised, "rows": rows._fingerprint, "failed": failed}
    (folder / f"{state.process_index}.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    of_a_rank(Path(sys.argv[1]))
