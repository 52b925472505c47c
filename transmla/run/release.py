"""What of an export is published: checked, without paths of this machine, with a manifest of all of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from transmla.errors import RecipeError
from transmla.files import MANIFEST, damage, listed_files, read_json, sha256_of
from transmla.recipe.local_paths import paths_in, short_names, shortened_tree, standing_in
from transmla.recipe.secrets import secret_in
from transmla.recipe.yaml_limits import read_tree
from transmla.report.model_card import CARD
from transmla.report.serving import REPOSITORY
from transmla.run.artifacts import METADATA, read_metadata

KEY = "push"
RECIPE, REPORT, EXPORTED = "recipe.yaml", "report.json", "exported"
BESIDE = ("LICENSE*", "LICENCE*", "NOTICE*", "figures/*.png")  # what is published beside what the manifest names
# Their tokens may look like anything, and the source's authors have published them.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tekken.json")
TEXTS = (".json", ".yaml", ".md", ".txt", ".jinja", "")  # by the end of the name
MAKING = "`transmla evaluate recipe=...` writes it"


@dataclass(frozen=True)
class ReleaseFile:
    """A file as it is published. content: where it lies, or its bytes where they differ from what lies there."""

    name: str
    content: Path | bytes
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Release:
    """A whole export. left_out: files of its folder that nothing accounts for, which stay where they are."""

    recipe: str
    files: list[ReleaseFile]
    left_out: list[str]


def prepare_release(folder: Path, repository: str) -> Release:
    """The files to publish of a finished run or an exported folder.

    Paths of this machine are shortened to names in the recipe and the metadata, which nearly always have some
    (`output_dir`). Elsewhere they are refused, and so are secrets anywhere: whoever wrote them there has to know.

    Raises:
        RecipeError: it is none, damaged, not verified, without a card, or holds what nobody else may read.
    """
    exported = folder / EXPORTED if (folder / EXPORTED).is_dir() else folder
    metadata = _verified(exported)
    card = exported / CARD
    if not card.is_file():
        raise RecipeError(KEY, f"{exported} has no card ({CARD}); {MAKING}")
    listed = listed_files(exported) or {}
    names = {*listed, CARD, *(str(file.relative_to(exported)) for pattern in BESIDE for file in exported.glob(pattern))}
    recipe = read_tree(exported / RECIPE, KEY) if RECIPE in names else {}
    local = short_names({*paths_in(recipe), *paths_in(metadata), *_places(exported)})
    files = [
        _text_file(RECIPE, yaml.safe_dump(shortened_tree(recipe, local), sort_keys=False, width=2**20)),
        _text_file(METADATA, json.dumps(shortened_tree(metadata, local), indent=1)),
        _text_file(CARD, _card(card).replace(REPOSITORY, repository)),
    ]
    made = {file.name for file in files}
    for name in sorted(names - made):
        path = exported / name
        digest = listed[name]["sha256"] if name in listed else sha256_of(path)
        files.append(ReleaseFile(name, path, path.stat().st_size, digest))
    for file in files:
        _require_public(file, local)
    manifest = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in sorted(files, key=lambda f: f.name)}
    files.append(_text_file(MANIFEST, json.dumps(manifest, indent=1)))
    there = (str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file())
    return Release(
        str(recipe.get("name", exported.name)),
        sorted(files, key=lambda file: file.name),
        sorted(set(there) - names - {MANIFEST}),
    )


def _verified(exported: Path) -> dict[str, Any]:
    """The metadata of an export that is whole, agreed with its student, and kept its recipe's thresholds.

    Raises:
        RecipeError: it is no such export.
    """
    metadata = read_metadata(exported) if exported.is_dir() else None
    if metadata is None or metadata.get("name") != "export":
        raise RecipeError(KEY, f"{exported} is no exported folder; name the output directory of a finished recipe")
    if (reason := damage(exported)) is not None:
        raise RecipeError(KEY, f"{exported} is damaged: {reason}; run its recipe again, which makes it anew")
    difference = metadata.get("max_abs_logprob_diff")
    if not isinstance(difference, float) or not math.isfinite(difference):
        raise RecipeError(KEY, f"{exported} was never compared with its student; run its recipe again")
    report = read_json(exported.parent / REPORT) if exported.name == EXPORTED else None
    required = report.get("required") if isinstance(report, dict) else None
    missed = [entry for entry in required or [] if isinstance(entry, dict) and entry.get("met") is False]
    if missed:
        raise RecipeError(
            KEY,
            f"a threshold of the recipe was missed ({missed[0].get('requirement')}); train on, or change "
            "evaluate.require and run `transmla evaluate` again",
        )
    return metadata


def _card(file: Path) -> str:
    """The card's text, whose block of YAML the hub will accept."""
    try:
        text = file.read_text(encoding="utf-8")
        ModelCard(text)
    except (UnicodeDecodeError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(KEY, f"the head of {file} is no metadata that the hub reads: {reason}; mend it") from None
    return text


def _places(exported: Path) -> Iterable[str]:
    """Folders of this machine that a file may name."""
    variables = (os.environ.get(name, "") for name in ("TRANSMLA_CACHE", "TRANSMLA_DATA", "HF_HOME", "TMPDIR"))
    places = (exported.resolve(), exported.resolve().parent, exported.absolute(), Path.home(), Path.cwd())
    return {text.rstrip("/") for text in (*map(str, places), *variables) if text.startswith("/") and text != "/"}


def _text_file(name: str, text: str) -> ReleaseFile:
    content = text.encode()
    return ReleaseFile(name, content, len(content), hashlib.sha256(content).hexdigest())


def _require_public(file: ReleaseFile, local: Iterable[str]) -> None:
    """Refuse a file of text with a secret or a path of this machine in it.

    Raises:
        RecipeError: it has one.
    """
    if file.name in VOCABULARIES or Path(file.name).suffix not in TEXTS:
        return
    content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    text = content.decode(errors="replace")
    if (found := secret_in(text)) is not None:
        raise RecipeError(KEY, f"{found} in {file.name}; nothing was uploaded; take it out, and change the secret")
    for path in local:
        if (pattern := standing_in(text, path)) is not None:
            line = 1 + text[: next(pattern.finditer(text)).start()].count("\n")
            raise RecipeError(KEY, f"{file.name} names {path} of this machine in line {line}; take it out")
