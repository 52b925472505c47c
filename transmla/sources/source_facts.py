"""What a source's files say of it to others: its name on the hub, its licence and its languages."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource
from transmla.recipe.yaml_limits import tree_of
from transmla.sources.kinds import kind_of

CARD = "README.md"
RANDOM = "random weights"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt")
# The hub's identifiers of licences that are known by how their text begins.
TEXTS = {
    "apache-2.0": r"\s*Apache License\s+Version 2\.0",
    "mit": r"\s*(The )?MIT License",
    "gpl-3.0": r"\s*GNU GENERAL PUBLIC LICENSE\s+Version 3",
}
FRONT = re.compile(r"\A\ufeff?---\r?\n(.*?)\r?\n---", re.DOTALL)
STRINGS = ("license", "license_name", "license_link")
CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[0-9a-f]+")  # a revision in the hub's cache
LARGEST = 2**20  # characters of a file that are looked at


def source_facts(section: ModelSource, folder: Path) -> dict[str, Any]:
    """Plain values, for the metadata of an export. folder: with the source's files.

    Returns:
        `name`, without the folder that a local source lies in; where they are known `hub`, its id, and `revision`;
        `license`, in the hub's words, `license_name`, `license_link`; `language`, a list. What the files do not say is
        left out.
    """
    found: dict[str, Any] = {"name": name_of(section.source)}
    if (hub := hub_id(section.source)) is not None:
        found["hub"] = hub
        if section.revision is not None:
            found["revision"] = section.revision
    card = _card(folder)
    found |= {name: card[name] for name in STRINGS if isinstance(card.get(name), str) and card[name].strip()}
    languages = card.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list):
        languages = ["no" if entry is False else entry for entry in languages]  # Norwegian, as YAML reads it
        if spoken := [entry for entry in languages if isinstance(entry, str)]:
            found["language"] = spoken
    if "license" not in found and (licence := _licence_of_text(folder)) is not None:
        found["license"] = licence
    return found


def hub_id(source: str) -> str | None:
    """The hub's name of a source, also of one that is named by its folder in the hub's cache."""
    if kind_of(source) == "hub":
        return source
    cached = CACHED.search(source) if kind_of(source) == "directory" else None
    return None if cached is None else f"{cached[1]}/{cached[2]}"


def name_of(source: str) -> str:
    """A source in words that say nothing about this machine."""
    kind = kind_of(source)
    if kind == "random":
        return RANDOM
    if kind == "pypi":
        return source
    return hub_id(source) or PurePosixPath(source).name or source


def card_text(facts: dict[str, Any]) -> str:
    """A card that `source_facts` reads these facts from. facts: strings and lists of strings."""
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def _card(folder: Path) -> dict[str, Any]:
    """The block of YAML at the head of a README; empty where there is none that can be read."""
    front = FRONT.match(_text(folder / CARD))
    if front is None:
        return {}
    try:
        tree = tree_of(front[1], CARD, "model.source")
    except RecipeError:
        return {}  # a card is for people; what it says is a help, not a condition
    return tree if isinstance(tree, dict) else {}


def _licence_of_text(folder: Path) -> str | None:
    text = next((_text(folder / name) for name in LICENCE_FILES if (folder / name).is_file()), None)
    if text is None:
        return None
    return next((licence for licence, pattern in TEXTS.items() if re.match(pattern, text, re.IGNORECASE)), "other")


def _text(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", errors="replace") as content:
            return content.read(LARGEST)
    except OSError:
        return ""
