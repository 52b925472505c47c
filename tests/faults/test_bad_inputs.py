"""Bad inputs of every kind: data, models, folders and launch files; beside them test_mistakes.py has keys and values.

Each is one line that names what is wrong, exit code 2, in seconds, before a weight is loaded; two processes both end.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.source_folder import WEIGHTS, copy_of, edit_json, edit_weights, make_source, shard
from transmla.cli import main

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]

GOOD = "".join(
    json.dumps({"text": f"Sentence number {n} about the sea and the wind. " * 5}) + "\n" for n in range(60)
).encode()
DATA = "recover.0.data=[%s]"
MODEL = ["model={source: ./m}"]


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def parquet(folder: Path, *, cut: int = 0, column: str = "text") -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({column: ["a sentence of text"] * 200}), folder / "p.parquet", compression="none")
    content = (folder / "p.parquet").read_bytes()
    (folder / "p.parquet").write_bytes(content[: len(content) - cut])


def config(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "m" / "config.json", **fields)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        change(tensors)

    return lambda folder: edit_weights(folder / "m", edit)


def to_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")


def narrower(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name][:-1]


def cut_off(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / "m" / name).read_bytes()
        (folder / "m" / name).write_bytes(content[: len(content) * 7 // 10])

    return change


def pickled(folder: Path) -> None:
    (folder / "m" / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(2)}, folder / "m" / "pytorch_model.bin")


def lost_shard(folder: Path) -> None:
    shard(folder / "m")[0].unlink()


def no_tokenizer(folder: Path) -> None:
    for file in (folder / "m").glob("tokenizer*"):
        file.unlink()


# what is wrong: (words after recipe=debug, the key that must be named, a word of the reason, what makes it so)
DATA_FILES = {
    "no such file": ([DATA % "gone.jsonl"], "recover.0.data", "no such file", None),
    "an empty file": ([DATA % "e.jsonl"], "recover.0.data", "", put("e.jsonl", b"")),
    "blank lines alone": ([DATA % "w.jsonl"], "recover.0.data", "", put("w.jsonl", b"\n \n")),
    "another column": ([DATA % "c.jsonl"], "recover.0.data", "text", put("c.jsonl", b'{"content": "a"}\n' * 20)),
    "an array": ([DATA % "a.jsonl"], "recover.0.data", "", put("a.jsonl", b'[{"text": "a"}]\n')),
    "numbers for text": ([DATA % "n.jsonl"], "recover.0.data", "", put("n.jsonl", b'{"text": 5}\n' * 50)),
    "a broken second line": (
        [DATA % "b.jsonl"],
        "recover.0.data",
        "row 2",
        put("b.jsonl", GOOD.replace(b"\n", b"\n{x\n", 1)),
    ),
    "random bytes": ([DATA % "r.txt"], "recover.0.data", "", put("r.txt", bytes(range(256)) * 80)),
    "UTF-16": ([DATA % "u.jsonl"], "recover.0.data", "", put("u.jsonl", GOOD.decode().encode("utf-16"))),
    "a gz that is none": ([DATA % "g.jsonl.gz"], "recover.0.data", "", put("g.jsonl.gz", GOOD)),
    "a gz cut off": ([DATA % "g.jsonl.gz"], "recover.0.data", "", put("g.jsonl.gz", gzip.compress(GOOD)[:-200])),
    "a parquet cut off": ([DATA % "p.parquet"], "recover.0.data", "", lambda folder: parquet(folder, cut=300)),
    "a parquet without the column": (
        [DATA % "p.parquet"],
        "recover.0.data",
        "text",
        lambda folder: parquet(folder, column="body"),
    ),
    "an unknown format": ([DATA % "d.csv"], "recover.0.data", "format", put("d.csv", b"text\na\n")),
    "a folder for a file": (
        [DATA % "f.jsonl"],
        "recover.0.data",
        "folder",
        lambda folder: (folder / "f.jsonl").mkdir(),
    ),
    "an unknown dataset": ([DATA % "alpacca"], "recover.0.data", "alpaca", None),
    "no dataset": (["recover.0.data=[]"], "recover.0.data", "at least one", None),
    "too little text to calibrate on": (
        ["convert.calibration.data=[s.jsonl]"],
        "convert.calibration",
        "",
        put("s.jsonl", b'{"text": "ab"}\n'),
    ),
    "too little text to evaluate on": (
        ["evaluate.data=[s.jsonl]"],
        "evaluate",
        "",
        put("s.jsonl", b'{"text": "ab"}\n'),
    ),
    "too little text for a row": ([DATA % "s.jsonl"], "recover.0", "", put("s.jsonl", b'{"text": ""}\n')),
    "a broken definition": ([DATA % "d.yaml"], "recover.0.data", "d.yaml", put("d.yaml", b"path: [")),
    "a definition with code": (
        [DATA % "d.yaml"],
        "recover.0.data",
        "d.yaml",
        put("d.yaml", b"path: !!python/object/apply:os.system ['x']"),
    ),
    "a definition of another column": (
        [DATA % "d.yaml"],
        "recover.0.data",
        "body",
        lambda folder: (put("t.jsonl", GOOD)(folder), put("d.yaml", b"path: t.jsonl\ncolumns: {text: body}")(folder)),
    ),
}
MODELS = {
    "no such directory": (["model={source: ./gone}"], "model.source", "", None),
    "no such hub id": (["model={source: nobody/nothing}"], "model", "", None),
    "no config": (MODEL, "model.source", "config.json", lambda folder: (folder / "m" / "config.json").unlink()),
    "a config that is none": (
        MODEL,
        "model.source",
        "",
        lambda folder: (folder / "m" / "config.json").write_text("[]"),
    ),
    "an unknown architecture": (MODEL, "model.source", "banana", config(model_type="banana")),
    "another architecture": (MODEL, "model", "gpt2", config(model_type="gpt2")),
    "no heads": (MODEL, "model", "num_attention_heads", config(num_attention_heads=0)),
    "three key heads of four": (MODEL, "model", "", config(num_key_value_heads=3)),
    "another width than the weights": (MODEL, "model.source", "", config(hidden_size=128)),
    "a layer more than the weights": (MODEL, "model.source", "", config(num_hidden_layers=3)),
    "an unknown rope": (MODEL, "model", "banana", config(rope_parameters={"rope_type": "banana", "rope_theta": 1e4})),
    "quantised weights": (MODEL, "model.source", "", config(quantization_config={"quant_method": "gptq", "bits": 4})),
    "weights cut off": (MODEL, "model.source", WEIGHTS, cut_off(WEIGHTS)),
    "empty weights": (MODEL, "model.source", WEIGHTS, lambda folder: (folder / "m" / WEIGHTS).write_bytes(b"")),
    "a matrix less": (
        MODEL,
        "model.source",
        "",
        weights(lambda found: found.pop("model.layers.1.self_attn.v_proj.weight")),
    ),
    "a matrix of another shape": (MODEL, "model.source", "", weights(narrower)),
    "a lost shard": (MODEL, "model.source", "is not there", lost_shard),
    "pickled weights": (MODEL, "model.source", "safetensors", pickled),
    "no tokenizer": (MODEL, "model.source", "tokenizer", no_tokenizer),
    "a broken tokenizer": (
        MODEL,
        "model.source",
        "tokenizer",
        lambda folder: (folder / "m" / "tokenizer.json").write_text("{x"),
    ),
    "an empty GGUF": (["model={source: g.gguf}"], "model.source", "", put("g.gguf", b"")),
    "a GGUF of noise": (["model={source: g.gguf}"], "model.source", "", put("g.gguf", b"\x07noise" * 900)),
    "a package without a digest": (["model={source: 'pypi:llm==1'}"], "model", "sha256", None),
    "a random model without facts": (["model={source: random}"], "model.config", "", None),
}
FOLDERS = {
    "a file for the output": (["output_dir=a_file"], "output_dir", "file", put("a_file", b"")),
    "an output that may not be written": (["output_dir=/proc/x"], "output_dir", "", None),
    "a link to nothing": (
        ["output_dir=link"],
        "output_dir",
        "link",
        lambda folder: (folder / "link").symlink_to(folder / "gone"),
    ),
    "a folder for a recipe": (["recipe=."], "recipe", "", None),
    "no recipe of that name": (["recipe=nowhere"], "recipe", "", None),
    "data in no folder": ([DATA % "wikitext2"], "recover.0.data", "TRANSMLA_DATA", None),
}
LAUNCHES = {
    "Megatron-LM": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    "a parallelism config": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
    "a launcher that compiles": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "recover.N.compile"),
    "FSDP of version 1": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version 1"),
    "ZeRO-1": ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage 1"),
}
CASES = DATA_FILES | MODELS | FOLDERS

# On two processes: data, models, keys, values, folders and launch files.
ON_TWO = [
    "no such file",
    "a broken second line",
    "a parquet cut off",
    "too little text to calibrate on",
    "a matrix less",
    "weights cut off",
    "no tokenizer",
    "an unknown architecture",
    "a file for the output",
]
KEYS_ON_TWO = {
    "an unknown key": (["convert.kv_lora_rnk=4"], "convert.kv_lora_rnk"),
    "a step beyond the budget": (["recover.0.tokens=300"], "recover.0.tokens"),  # a step of two processes has 512
    "an unknown token": (["recover.1.trainer.eos_token=<nope>"], "recover.1.trainer.eos_token"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "m")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    monkeypatch.chdir(tmp_path)
    copy_of(source, tmp_path / "m")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSMLA_DATA", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What a command imports: no input is charged with it."""
    from transmla.run import pipeline  # noqa: F401


def given(words: list[str]) -> list[str]:
    recipe = [] if words[0].startswith("recipe=") else ["recipe=debug"]
    out = [] if words[0].startswith("output_dir=") else ["output_dir=out"]
    return [*recipe, *words, *out, "device=cpu"]


def test_there_are_enough() -> None:
    assert len(CASES) + len(LAUNCHES) + len(KEYS_ON_TWO) >= 60 and len(ON_TWO) + len(KEYS_ON_TWO) >= 12


def refused(words: list[str], capsys, monkeypatch) -> str:
    """The one line of a refusal."""
    load = "transformers.PreTrainedModel.from_pretrained"
    monkeypatch.setattr(load, classmethod(lambda cls, *args, **options: pytest.fail("weights were loaded")))
    started = time.monotonic()
    assert main(["recover", *given(words)]) == 2
    assert time.monotonic() - started < 5
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed and printed.startswith("error: ")
    return printed


@pytest.mark.parametrize("what", CASES)
def test_one_line_before_weights(what: str, tmp_path: Path, capsys, monkeypatch) -> None:
    words, key, reason, make = CASES[what]
    if make is not None:
        make(tmp_path)
    if what == "data in no folder":
        monkeypatch.setenv("TRANSMLA_DATA", "/nowhere")
    printed = refused(words, capsys, monkeypatch)
    assert printed.startswith(f"error: {key}"), printed
    assert reason in printed


@pytest.mark.parametrize("what", LAUNCHES)
def test_a_launch_file_that_no_stage_runs_in(what: str, capsys, monkeypatch) -> None:
    variables, reason = LAUNCHES[what]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    printed = refused(["seed=1"], capsys, monkeypatch)
    assert printed.startswith("error: launch: ") and reason in printed


def on_two_processes(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(ROOT / "recover.py"), *given(words)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=os.environ | settings)


def check_both_ended(done: subprocess.CompletedProcess, key: str) -> None:
    lines = [line for line in done.stderr.splitlines() if re.match(r"error( on process \d)?: ", line)]
    assert done.returncode != 0 and lines, done.stderr[-2000:]
    assert all(line.partition(": ")[2].startswith(key) for line in lines), lines
    assert 'recover.py", line' not in done.stderr  # no traceback of ours; the launcher's report names exit codes
    codes = set(re.findall(r"exitcode\s*: (-?\d+)", done.stderr))
    assert codes <= {"2", "-15", "143"}, done.stderr[-2000:]  # the last two: torchrun ended the other one, as it does


@pytest.mark.parametrize("what", ON_TWO)
def test_both_processes_end(what: str, tmp_path: Path) -> None:
    words, key, _, make = CASES[what]
    if make is not None:
        make(tmp_path)
    check_both_ended(on_two_processes(words, tmp_path), key)


@pytest.mark.parametrize("what", KEYS_ON_TWO)
def test_both_processes_end_on_a_key(what: str, tmp_path: Path) -> None:
    words, key = KEYS_ON_TWO[what]
    check_both_ended(on_two_processes(words, tmp_path), key)


def test_both_processes_end_on_a_launch_file(tmp_path: Path) -> None:
    check_both_ended(on_two_processes(["seed=1"], tmp_path, ACCELERATE_DYNAMO_BACKEND="INDUCTOR"), "launch")
