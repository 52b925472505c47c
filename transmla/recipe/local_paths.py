"""Paths of this machine in a recipe and in what follows from it: found, and shortened for what others may read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from transmla.recipe.secrets import leaves

# Keys below which a value may begin with a slash and is no path.
FREE_TEXT = ("prompts", "prompt", "system", "think", "cues", "continuations", "replies")
PATH = re.compile(r"(/|~/)[^\n]*[^\n/][^\n]*")


def is_local_path(text: str) -> bool:
    """Whether a value names a file by where it lies on a machine: from the root, or from the home directory."""
    return PATH.fullmatch(text) is not None


def paths_in(tree: Any) -> set[str]:
    """The local paths among the keys and values of a plain tree."""
    found = set()
    for place, value in leaves(tree):
        if not any(part in FREE_TEXT for part in place):
            found |= {text.rstrip("/") for text in (*place, value) if isinstance(text, str) and is_local_path(text)}
    return found


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """By path, its last part; as many parts as tell it from the others where two end alike. The longest come first."""
    parts = {path: PurePosixPath(path.lstrip("/~")).parts for path in paths}
    names = {}
    for path, own in parts.items():
        others = [other for other in parts.values() if other != own]
        count = next(
            (count for count in range(1, len(own)) if all(other[-count:] != own[-count:] for other in others)), len(own)
        )
        names[path] = "/".join(own[-count:])
    return dict(sorted(names.items(), key=lambda pair: -len(pair[0])))


def standing_in(text: str, path: str) -> re.Pattern[str] | None:
    """What finds a path in a text, as a whole or as the folder of a longer one; None: it is not there."""
    pattern = re.compile(rf"(?<![\w.~/-]){re.escape(path)}(?![\w-])")
    return pattern if path in text and pattern.search(text) else None


def shortened(text: str, names: dict[str, str]) -> str:
    """A text with paths replaced. names: of `short_names`."""
    for path, name in names.items():
        if (pattern := standing_in(text, path)) is not None:
            text = pattern.sub(name.replace("\\", r"\\"), text)
    return text


def shortened_tree(tree: Any, names: dict[str, str]) -> Any:
    """A plain tree with paths replaced in its keys and values."""
    if isinstance(tree, dict):
        return {shortened(str(key), names): shortened_tree(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [shortened_tree(value, names) for value in tree]
    return shortened(tree, names) if isinstance(tree, str) else tree
