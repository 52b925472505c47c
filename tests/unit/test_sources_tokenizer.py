"""A tokenizer that cannot be read, or is not the model's, is refused before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.source_folder import assert_refused, copy_of, make_source
from transmla.sources.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model")


def _sentencepiece_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


def _more_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"more{index}": index for index in range(258, 300)}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _special_beyond(**more: str) -> Callable[[Path], None]:
    """A special token after the model's last row. more: fields of the tokenizer's settings."""

    def change(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>", "<image>"]})
        for name, value in more.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)

    return change


TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda f: [file.unlink() for file in f.glob("token*")], "has no tokenizer (tokenizer.json)"),
    "broken": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot read the tokenizer"),
    "of another kind": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot read the tokenizer"),
    "a pointer": (lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"), "LFS"),
    "settings broken": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "is no JSON object"),
    "sentencepiece alone": (_sentencepiece_alone, "pip install sentencepiece"),
    "half a vocabulary": (lambda f: (f / "tokenizer.json").rename(f / "vocab.json"), "has no tokenizer"),
    "more tokens": (
        _more_tokens,
        "40 tokens that the model does not know ('more260' is number 260",
    ),
    "a pad beyond": (_special_beyond(pad_token="<image>"), "'<image>' is number 260"),
    "a template's beyond": (_special_beyond(chat_template="{{'<image>' + messages[0].content}}"), "'<image>'"),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_tokenizer_that_is_not_the_models(source: Path, tmp_path: Path, capsys, damage: str) -> None:
    assert_refused(source, tmp_path, capsys, *TOKENIZERS[damage])


def test_a_special_token_that_nothing_writes_may_lie_beyond(source: Path, tmp_path: Path) -> None:
    """Gemma 3's text models have one for images after the last row of the embedding."""
    folder = copy_of(source, tmp_path / "model")
    _special_beyond()(folder)
    assert len(load_tokenizer(folder, "k")) == 261
