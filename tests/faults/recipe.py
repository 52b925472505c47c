"""The recipe that is damaged and killed here: written text, a recorded teacher, rates that do not fall, adapters."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

TRAINER = {
    "max_length": 128,
    "per_device_train_batch_size": 2,
    "learning_rate": 1.0e-3,
    "save_steps": 4,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
}
STEPS = (12, 8, 12, 10)  # of the stages
TREE = {
    "defaults": ["debug", "_self_"],
    "name": "faults",
    "output_dir": "out",
    "write": [{"name": "own", "kind": "text", "tokens": 600, "max_new_tokens": 24, "batch_size": 8}],
    "convert": {"calibration": {"data": ["text.jsonl"], "tokens": 1024, "max_length": 128}},
    "recover": [
        {"kind": "layerwise", "data": ["text.jsonl"]},
        {"kind": "distill", "data": ["text.jsonl"], "teacher": "recorded"},
        {"kind": "distill", "data": ["text.jsonl", "@own"], "train": "all"},
        {"kind": "sft", "data": ["text.jsonl"], "train": "lora", "lora": {"dropout": 0.1}},
    ],
    "evaluate": {
        "data": ["sample_heldout"],
        "tokens": 256,
        "max_length": 128,
        "prompts": ["The sea"],
        "max_new_tokens": 4,
    },
    "export": {"verify": {"tokens": 64}},
}


def save(folder: Path, *, recorded: bool = True) -> None:
    """The recipe and its text; commands run in this folder. recorded: one stage needs the verb `record` before."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = [
        {**stage, "tokens": steps * 2 * 128, "trainer": TRAINER}
        for stage, steps in zip(TREE["recover"], STEPS, strict=True)
    ]
    if not recorded:
        del stages[1]["teacher"]
    (folder / "faults.yaml").write_text(yaml.safe_dump({**TREE, "recover": stages}))
    rows = [f"Chapter {number}. Ship {number * 7 % 13} sailed slowly towards the islands. " * 6 for number in range(80)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def contents(out: Path) -> dict[str, str]:
    """Digests of all weights, states and rows of finished artifacts."""
    files = [file for suffix in ("*.safetensors", "*.bin", "data.jsonl") for file in sorted(out.rglob(suffix))]
    found = {str(file.relative_to(out)): file for file in files}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in found.items()
        if not name.startswith(("checkpoints", "logs")) and ".partial" not in name
    }
