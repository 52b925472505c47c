"""Artifacts: directories that appear whole or not at all, are made once, and say what made them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf

from transmla import __version__
from transmla.errors import RecipeError
from transmla.files import (
    MANIFEST,
    PARTIAL,
    damage,
    fsync,
    fsync_tree,
    listed_files,
    read_json,
    remove,
    save_manifest,
    scratch_folder,
    sha256_of,
)
from transmla.hardware import peak_memory, reset_peak_memory
from transmla.process.stopping import held
from transmla.recipe.interpolations import as_written
from transmla.recipe.schema import Recipe
from transmla.run.context import Run
from transmla.sources.file_digests import keep_digests, known_digests, read_digests

T = TypeVar("T")

METADATA = "transmla.json"  # beside every artifact: fingerprint, seconds, tokens, peak memory, versions


@dataclass(frozen=True)
class Condition:
    """How an artifact is found. current: whole, and made from the wanted settings and inputs. damage: what is broken of
    one that is, or may be, of these settings, in words."""

    current: bool
    damage: str | None = None


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """The metadata of a finished artifact; None where it has none that can be read."""
    metadata = read_json(folder / METADATA)
    return metadata if isinstance(metadata, dict) and "fingerprint" in metadata else None


def condition(folder: Path, digest: str) -> Condition:
    """How an artifact of these settings and inputs is found: all files are looked for and measured, and those that have
    changed since they were last read are read."""
    metadata = read_metadata(folder)
    if metadata is None:
        there = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
        return Condition(False, f"{METADATA} is missing or cannot be read" if there else None)
    if metadata["fingerprint"] != digest:
        own = (listed_files(folder) or {}).get(METADATA)
        true = own is None or own["sha256"] == sha256_of(folder / METADATA)
        return Condition(False, None if true else f"{METADATA} has another content than was written")
    found = damage(folder, known_digests) and damage(folder, read_digests)  # what was kept may itself be damaged
    return Condition(found is None, found)


def is_current(folder: Path, digest: str) -> bool:
    """Whether a finished artifact is whole, and was made from exactly these settings and inputs."""
    return condition(folder, digest).current


def require_unharmed(folder: Path) -> None:
    """Read a finished folder whole, before what it holds is used. One without a manifest is the user's own.

    Raises:
        RecipeError: its content is not what was written.
    """
    if not (folder / MANIFEST).is_file():
        return
    if (found := damage(folder, read_digests)) is not None:
        raise RecipeError("output_dir", f"{folder} is damaged: {found}; run recover.py again, which makes it anew")


def require(folder: Path, digest: str, needing: str, making: str) -> None:
    """Refuse to go on without an artifact.

    Args:
        needing, making: what needs it, and the command that makes it.

    Raises:
        RecipeError: it is missing, damaged or of other settings.
    """
    found = condition(folder, digest)
    if found.damage is not None:
        raise RecipeError(
            "output_dir", f"{needing} needs {folder}, which is damaged: {found.damage}; run {making} first"
        )
    if not found.current:
        raise RecipeError(
            "recipe", f"{needing} needs {folder}, which is missing or of other settings; run {making} first"
        )


@contextmanager
def publishing(folder: Path, metadata: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary directory; on success add metadata and manifest, sync, and rename it to `folder`.

    The caller may add to `metadata` until the block ends. On an exception nothing appears under the final name, and an
    earlier artifact stays.
    """
    with scratch_folder(folder.with_name(f"{PARTIAL}-{folder.name}")) as scratch:
        yield scratch
        (scratch / METADATA).write_text(json.dumps(metadata, indent=1))
        digests = save_manifest(scratch)
        fsync_tree(scratch)
        old = folder.with_name(f"{PARTIAL}-old-{folder.name}")
        remove(old)
        with held():  # between these two there is neither
            if folder.exists() or folder.is_symlink():
                os.replace(folder, old)
            os.replace(scratch, folder)
        fsync(folder.parent)
        remove(old)
    keep_digests({folder / name: digest for name, digest in digests.items()})


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"transmla": __version__} | {name: version(name) for name in ("torch", "transformers", "trl")}


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """The recipe beside what it made."""
    OmegaConf.save(OmegaConf.create(as_written(recipe)), folder / "recipe.yaml")


def agreed(run: Run, ask: Callable[[], T]) -> T:
    """The first process's answer, in all processes, so that all do the same.

    Raises:
        RecipeError: the first process's, in all of them.
    """
    told: list[Any] = [None, None]
    if run.state.is_main_process:
        try:
            told = [ask(), None]
        except RecipeError as error:
            told = [None, (error.key, error.problem)]
    broadcast_object_list(told)
    answer, refusal = told
    if refusal is not None:
        raise RecipeError(*refusal)
    return answer


def current(run: Run, folder: Path, digest: str) -> bool:
    """Whether an artifact is there, whole and current."""
    return agreed(run, lambda: is_current(folder, digest))


def unchanged(run: Run, folder: Path, digest: str, label: str) -> bool:
    """Whether there is nothing to make; says so, or why something is made again that was there."""
    found = agreed(run, lambda: condition(folder, digest))
    if found.current:
        run.say(f"[{label}] unchanged, skipped")
    elif found.damage is not None:
        run.say(f"[{label}] {folder} is damaged: {found.damage}; it is made again")
    return found.current


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
    if unchanged(run, folder, digest, label):
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
