"""A whole recipe whose model and data are names of the hub, in a process of its own; then again without the hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import HubServer
from tests.source_folder import make_source, shard

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
defaults: [debug, _self_]
name: hub
model: {source: org/tiny, config: null}
convert: {calibration: {data: [text.yaml], tokens: 512, max_length: 128}}
recover:
  - {kind: layerwise, data: [text.yaml], tokens: 256, trainer: {max_length: 128, per_device_train_batch_size: 2}}
evaluate: {data: [held.yaml], tokens: 256, max_length: 128, prompts: []}
export: {verify: {tokens: 64}}
"""


def rows(word: str) -> bytes:
    text = "{} {}. The sea was calm on day {}, and ships sailed slowly north. " * 4
    texts = [text.format(*[word, index, index] * 4) for index in range(40)]
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def run(server: HubServer, folder: Path, out: str, *, offline: bool) -> subprocess.CompletedProcess[str]:
    environment = server.environment(folder / "home", offline=offline) | {"TRANSMLA_CACHE": str(folder / "cache")}
    command = [sys.executable, str(ROOT / "recover.py"), "recipe=hub.yaml", "device=cpu", f"output_dir={out}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hub.yaml").write_text(RECIPE)
    for name in ("text", "held"):
        definition = f"hub: org/lines\nsubset: {name}\nsplit: train\ncolumns: {{text: text}}\n"
        (tmp_path / f"{name}.yaml").write_text(definition)
    return tmp_path


def test_a_recipe_of_hub_names(folder: Path) -> None:
    source = make_source(folder / "source")
    shards = shard(source)
    (source / "consolidated.safetensors").write_bytes(b"".join(file.read_bytes() for file in shards))
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"\0" * 1000)
    card = "configs:\n- {config_name: text, data_files: text.jsonl}\n- {config_name: held, data_files: held.jsonl}\n"
    lines = {"README.md": f"---\n{card}---\n".encode(), "text.jsonl": rows("Chapter"), "held.jsonl": rows("Report")}
    with HubServer() as server:
        server.add_model("org/tiny", source)
        server.add_dataset("org/lines", lines)
        done = run(server, folder, "online", offline=False)
        assert done.returncode == 0, done.stderr
        names = ["config.json", "generation_config.json", "model.safetensors.index.json"]
        names += ["tokenizer.json", "tokenizer_config.json", *(file.name for file in shards)]
        assert server.downloads("org/tiny") == {name: (source / name).stat().st_size for name in names}
        assert server.downloads("org/lines") == {name: len(content) for name, content in lines.items()}
        seen = len(server.log)
        again = run(server, folder, "offline", offline=True)
        assert again.returncode == 0, again.stderr
        assert len(server.log) == seen
    exported = [digest(folder / out / "exported" / "model.safetensors") for out in ("online", "offline")]
    assert exported[0] == exported[1]
