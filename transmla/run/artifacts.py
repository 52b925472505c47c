"""Artifacts: directories that appear whole or not at all, are made once, and say what made them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf

from transmla import __version__
from transmla.files import PARTIAL, fsync, fsync_tree
from transmla.hardware import peak_memory, reset_peak_memory
from transmla.recipe.interpolations import as_written
from transmla.recipe.schema import Recipe
from transmla.run.context import Run

METADATA = "transmla.json"  # beside every artifact: fingerprint, seconds, tokens, peak memory, versions


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """The metadata of a finished artifact, or None."""
    file = folder / METADATA
    return json.loads(file.read_text()) if file.is_file() else None


def is_current(folder: Path, digest: str) -> bool:
    """Whether a finished artifact was made from exactly these settings and inputs."""
    metadata = read_metadata(folder)
    return metadata is not None and metadata["fingerprint"] == digest


@contextmanager
def publishing(folder: Path, metadata: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary directory; on success add the metadata, sync, and rename it to `folder`.

    The caller may add to `metadata` until the block ends. On an exception nothing appears under the final name, and an
    earlier artifact stays.
    """
    scratch = folder.with_name(f"{PARTIAL}-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        (scratch / METADATA).write_text(json.dumps(metadata, indent=1))
        fsync_tree(scratch)
        old = folder.with_name(f"{PARTIAL}-old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(scratch, folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"transmla": __version__} | {name: version(name) for name in ("torch", "transformers", "trl")}


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """The recipe beside what it made."""
    OmegaConf.save(OmegaConf.create(as_written(recipe)), folder / "recipe.yaml")


def current(run: Run, folder: Path, digest: str) -> bool:
    """Whether an artifact is there and current. The first process looks, so that all processes do the same."""
    answer = [is_current(folder, digest)]
    broadcast_object_list(answer)
    return answer[0]


def make(
    run: Run,
    folder: Path,
    digest: str,
    label: str,
    build: Callable[[Path, dict[str, Any]], None],
    before: Callable[[], None] | None = None,
) -> bool:
    """Make an artifact on the first process unless it is current; returns whether it was made.

    Args:
        build: fills a folder and completes its metadata.
        before: what all processes do for it first; its time and memory are in the metadata too.
    """
    if current(run, folder, digest):
        run.say(f"[{label}] unchanged, skipped")
        return False
    run.say(f"[{label}] ...")
    started = time.monotonic()
    reset_peak_memory(run.prepared.device)
    if before is not None:
        before()
    if run.state.is_main_process:
        metadata: dict[str, Any] = {"name": label, "fingerprint": digest, "versions": versions()}
        with publishing(folder, metadata) as scratch:
            save_recipe(run.recipe, scratch)
            build(scratch, metadata)
            metadata["seconds"] = round(time.monotonic() - started, 1)
            metadata["peak_memory_bytes"] = peak_memory(run.prepared.device)
        run.say(f"[{label}] {metadata['seconds']} s")
    run.state.wait_for_everyone()
    return True
