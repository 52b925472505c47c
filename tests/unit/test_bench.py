"""The table of speeds."""

import json

import torch

from transmla.bench.speed_table import render
from transmla.cli import main


def test_the_stages_of_a_recipe(tmp_path, capsys) -> None:
    """Every stage that can be is measured, some steps of it, and nothing else is left."""
    sft = "{kind: sft, data: [sample_train], tokens: 1024, trainer: {max_length: 128, per_device_train_batch_size: 2}}"
    on_policy = "{kind: on_policy, data: [sample_train], tokens: 1024, prompt_tokens: 16, max_new_tokens: 16}"
    words = ["recipe=debug", "device=cpu", f"output_dir={tmp_path}/out", f"recover=[{sft}, {on_policy}]"]
    assert main(["bench", *words]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md"]
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    measured, skipped = found["stages"]
    assert measured["stage"] == "recover.0 sft" and measured["tokens a second"] > 0
    assert measured["planned memory"] > 0 and "compiled" in measured["computed by"]
    assert skipped["stage"] == "recover.1 on_policy" and "writes" in skipped["skipped"]
    (decoded,) = found["decoding"]
    assert list(decoded["tokens a second"]) == ["source", "student"] and decoded["shape"] == "1 x 64"
    assert found["kernels"] == [] and f"CPU, {torch.get_num_threads()} threads" in capsys.readouterr().out


def test_kernels_in_the_table() -> None:
    row = {"kernel": "one query", "shape": "1 x 2", "ms": 0.12345, "TB/s": 2.5, "others": {"source": 0.2}}
    plain = {"kernel": "packed", "shape": "4", "ms": 2.0, "others": {"mask": 18.0, "batch": 1.5}}
    loss = {"kernel": "KL", "shape": "8", "ms": 46.0, "GiB": 0.7, "gradient error": 0.002, "others": {"trl": 80.0}}
    found = {"recipe": "r", "device": "d", "torch": "2", "dtype": "bfloat16", "stages": []}
    found |= {"kernels": [row, plain, loss]}
    found["decoding"] = [{"shape": "1 x 2", "written": 3, "tokens a second": {"source": 1000.0, "student": None}}]
    lines = render(found).splitlines()
    assert "| one query | 1 x 2 | 0.123 | 2.50 |  |  | source 0.2 |" in lines
    assert "| packed | 4 | 2 |  |  |  | mask 18, batch 1.5 |" in lines
    assert "| KL | 8 | 46 |  | 0.70 | 0.20% | trl 80 |" in lines
    assert "| 1 x 2 | 3 | 1,000 | not measured |" in lines
