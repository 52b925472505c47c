"""Models of the hub: the files that a conversion reads and no others, all of one commit."""

from __future__ import annotations

import functools
import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from transmla.errors import RecipeError
from transmla.hardware import require_disk
from transmla.recipe.model_source import ModelSource
from transmla.sources.hub_commits import commit_of
from transmla.sources.weight_files import INDEX, SINGLE, indexed_files, weight_files, without_weights

CONFIG = "config.json"
SMALL = (
    CONFIG,
    "generation_config.json",
    "adapter_config.json",  # its presence is refused
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",  # its licence and languages go into the card of an export
)

ANSWER_S = 10.0  # seconds that the hub has to answer a question about a repository


@dataclass(frozen=True)
class Snapshot:
    """A revision in the hub's cache, with its config.json at least.

    folder: called after the commit. files: of the commit, with their sizes in bytes; None where the hub did not
    answer, with the reason why not.
    """

    folder: Path
    files: dict[str, int] | None
    reason: Exception | None = None


def config_folder(section: ModelSource, key: str) -> Path:
    """The folder in the hub's cache that has the source's config.json. key: of the section in the recipe.

    Raises:
        RecipeError: the repository cannot be read, or has no such revision or file.
    """
    return _snapshot(section, key).folder


def small_files(section: ModelSource, key: str) -> Path:
    """The folder with the source's configuration and tokenizer, downloaded where need be.

    Raises:
        RecipeError: the hub does not answer, or has no such model.
    """
    found = _snapshot(section, key)
    if found.files is not None:
        _download(section, found.folder, [name for name in SMALL if name in found.files], key)
    return found.folder


def weights(section: ModelSource, key: str) -> Path:
    """The same folder with the weights that transformers would load, downloaded where need be: not those of other
    formats beside them.

    Raises:
        RecipeError: there are none in safetensors, they are not to be had, or the disk has no room for them.
    """
    found = _snapshot(section, key)
    folder, files = found.folder, found.files
    if files is None:
        if not _is_whole(folder):
            raise _refusal(found.reason or FileNotFoundError(folder), section, key)
        return folder
    if SINGLE in files:
        names = [SINGLE]
    elif INDEX in files:
        _download(section, folder, [INDEX], key)
        try:
            names = indexed_files((folder / INDEX).read_bytes())
        except ValueError as error:
            raise RecipeError(f"{key}.source", f"{INDEX} of {section.source}: {error}; use another revision") from None
        if absent := sorted(set(names) - files.keys()):
            raise RecipeError(
                f"{key}.source", f"{section.source} lacks {absent[0]}, which its {INDEX} names; use another revision"
            )
    else:
        raise RecipeError(f"{key}.source", f"{section.source} {without_weights(files)}")
    needed = sum(files[name] for name in names if not (folder / name).is_file())
    require_disk(Path(constants.HF_HUB_CACHE), needed, f"{key}.source")
    _download(section, folder, names, key)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the cache has the weights, and not only what was asked for before they were."""
    try:
        return all(file.is_file() for file in weight_files(folder, ""))
    except RecipeError:
        return False


def _snapshot(section: ModelSource, key: str) -> Snapshot:
    try:
        return _asked_once(section.source, section.revision)
    except _NoConfigError:
        raise RecipeError(
            f"{key}.source",
            f"{section.source} has no {CONFIG}, so it is no model of transformers; if it holds a GGUF, download that "
            "and give its path",
        ) from None
    except Exception as error:  # of the hub's client, and of whatever library it speaks HTTP with
        raise _refusal(error, section, key) from None


@functools.cache
def _asked_once(source: str, revision: str | None) -> Snapshot:
    """The files of the commit that fingerprints name, even if the branch moves meanwhile."""
    name = revision or constants.DEFAULT_REVISION
    commit = commit_of(source, revision, "model") or name
    try:
        info = HfApi().model_info(source, revision=commit, files_metadata=True, timeout=ANSWER_S)
        files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        if CONFIG not in files:
            raise _NoConfigError
        # By the name of the branch, so that the cache learns what it means: that is what a run without the hub asks.
        hf_hub_download(source, CONFIG, revision=name)
        return Snapshot(Path(hf_hub_download(source, CONFIG, revision=info.sha)).parent, files)
    except (_NoConfigError, HFValidationError, RevisionNotFoundError):
        raise
    except Exception as error:  # of the hub's client, and of whatever library it speaks HTTP with
        cached = try_to_load_from_cache(source, CONFIG, revision=commit)
        if not isinstance(cached, str):
            raise
        return Snapshot(Path(cached).parent, None, error)


class _NoConfigError(Exception):
    """The repository is there, and is no model of transformers."""


def _download(section: ModelSource, folder: Path, names: Iterable[str], key: str) -> None:
    patterns = [glob.escape(name) for name in names]
    try:
        snapshot_download(section.source, revision=folder.name, allow_patterns=patterns)
    except Exception as error:  # of the hub's client, and of whatever library it speaks HTTP with
        raise _refusal(error, section, key) from None


def _refusal(error: Exception, section: ModelSource, key: str) -> RecipeError:
    """An error of the hub's client in words of the recipe."""
    source, revision = section.source, section.revision
    if isinstance(error, HFValidationError):
        return RecipeError(f"{key}.source", f"{source!r} is no folder that is there and no hub id; give ORG/NAME")
    if isinstance(error, GatedRepoError):
        return RecipeError(
            f"{key}.source", f"{source} is gated; accept its terms on its page, and set HF_TOKEN to a token of yours"
        )
    if isinstance(error, RepositoryNotFoundError):
        return RecipeError(
            f"{key}.source",
            f"there is no model {source} on the hub that you may read, and no folder of that name here; correct the "
            "name, or set HF_TOKEN if it is private",
        )
    if isinstance(error, RevisionNotFoundError):
        return RecipeError(f"{key}.revision", f"{source} has no revision {revision!r}; give a branch, tag or commit")
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set, and the hub's cache has not all of it"
    return RecipeError(f"{key}.source", f"cannot download {source}: {reason}; try again, or give the path of a copy")
