"""Which commit a revision of a hub repository is."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Literal

from transmla.files import save_whole
from transmla.sources.kinds import cache_folder


@cache
def commit_of(repository: str, revision: str | None, kind: Literal["model", "dataset"]) -> str | None:
    """The commit that a revision (None: the main branch) is now; offline, what it was when it was last asked for.

    None where that was never known.
    """
    from huggingface_hub import HfApi, constants

    name = revision or "main"
    if re.fullmatch("[0-9a-f]{40}", name):
        return name
    place = f"{kind}s--{repository.replace('/', '--')}"
    kept = cache_folder() / "commits" / place / name.replace("/", "--")
    try:
        commit = HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=10).sha
    except Exception:  # offline, renamed, private: the hub's library has an error for each, and so has its transport
        commit = None
    if commit is not None:
        save_whole(kept, commit)
        return commit
    for file in (kept, Path(constants.HF_HUB_CACHE) / place / "refs" / name):
        if file.is_file():
            return file.read_text().strip()
    return None
