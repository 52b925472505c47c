"""What an export says of its source: only what the source's files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from transmla.recipe.model_source import ModelSource
from transmla.sources.gguf_header import header_facts
from transmla.sources.source_facts import card_text, source_facts

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


def facts(folder: Path, card: str | bytes | None = None, **files: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True, parents=True)
    if card is not None:
        (folder / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    for name, content in files.items():
        (folder / name).write_text(content)
    return source_facts(ModelSource(source=str(folder)), folder)


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: mit\nlanguage: en\n---\n# A", {"license": "mit", "language": ["en"]}),
        ("---\r\nlicense: mit\r\nlanguage:\r\n- de\r\n- no\r\n---\r\n", {"license": "mit", "language": ["de", "no"]}),
        (
            "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "llama3.2", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [mit]\nlanguage: {a: b}\n---\n", {}),
        ("---\na: &a [b]\nlicense: [\n---\n", {}),
        ("# no block\nlicense: mit\n", {}),
        (b"\0" * 1000, {}),
        (None, {}),
    ],
)
def test_a_card(tmp_path: Path, card: str | bytes | None, expected: dict[str, Any]) -> None:
    assert facts(tmp_path / "model", card) == {"name": "model"} | expected


def test_a_licence_file_where_no_card_says(tmp_path: Path) -> None:
    assert facts(tmp_path / "a", LICENSE=APACHE)["license"] == "apache-2.0"
    assert facts(tmp_path / "b", LICENSE="MIT License\n\nCopyright")["license"] == "mit"
    assert facts(tmp_path / "c", LICENSE="LLAMA 3 COMMUNITY LICENSE AGREEMENT")["license"] == "other"
    assert facts(tmp_path / "d", "---\nlicense: gemma\n---\n", LICENSE=APACHE)["license"] == "gemma"


def test_names(tmp_path: Path) -> None:
    """A hub id where there is one, also in the path of the hub's cache; never a folder of this machine."""
    assert source_facts(ModelSource(source="org/m", revision="v2"), tmp_path) == {
        "name": "org/m",
        "hub": "org/m",
        "revision": "v2",
    }
    cached = facts(tmp_path / "hub" / "models--org--My-Model" / "snapshots" / ("0a" * 20))
    assert (cached["name"], cached["hub"]) == ("org/My-Model", "org/My-Model")
    package = ModelSource(source="pypi:llm-x==0.1", sha256="a" * 64)
    assert source_facts(package, tmp_path) == {"name": "pypi:llm-x==0.1"}
    assert source_facts(ModelSource(source="random"), tmp_path) == {"name": "random weights"}
    assert source_facts(ModelSource(source="/home/me/x.gguf"), tmp_path) == {"name": "x.gguf"}


def test_the_header_of_a_gguf(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_string("general.license", "apache-2.0")
    writer.add_array("general.languages", ["en", "no"])
    writer.add_array("tokenizer.ggml.tokens", ["a"] * 5000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = header_facts(tmp_path / "x.gguf")
    assert found == {"license": "apache-2.0", "language": ["en", "no"]}
    assert facts(tmp_path / "made", card_text(found)) == {"name": "made"} | found
