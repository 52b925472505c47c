"""`transmla env`: what a bug report needs, and nothing that it must not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from transmla.cli import main


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    assert main(["env"]) == 0
    return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


def test_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefgh")
    monkeypatch.setenv("TRANSMLA_CACHE", f"{tmp_path}/cache")
    found = printed(capsys)
    names = {"transmla", "python", "torch", "transformers", "trl", "accelerate", "huggingface-hub", "numpy", "system"}
    names |= {"processor", "cores", "memory", "disk", "compiler", "cuda", "driver", "device", "accelerate config"}
    assert names <= found.keys() and all(found.values())
    assert found["cache"].strip() == "~/cache" and "hf_" not in str(found.values())


def test_a_default_launch_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """One that `accelerate config` once wrote, and that nobody names."""
    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    assert printed(capsys)["accelerate config"].strip() == "none"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: fp16\nmachine_rank: 0\n")
    said = printed(capsys)["accelerate config"].strip()
    assert said == f"{file} (distributed_type MULTI_GPU, num_processes 2, mixed_precision fp16)"
    file.write_text("a: [")
    assert "is not valid YAML" in printed(capsys)["accelerate config"]
