"""The rows of docs/serving.md in the engines that are installed: whatever the table says of a cell is what they do.

    TRANSMLA_VLLM_PYTHON=... TRANSMLA_LLAMA_CPP_PYTHON=... pytest -m serving -n0 -s -k engine_table

prints what was measured. TRANSMLA_SMOLLM2 and TRANSMLA_QWEN05 name directories with the real models; rows without
theirs are skipped. TRANSMLA_ROWS names a folder where the exports are kept for the next time.
"""

import os
from pathlib import Path

import pytest

from tests.engine_rows import ROWS
from tests.serving.installed import python_of
from transmla.cli import main
from transmla.errors import RecipeError
from transmla.export.engines import reading_of
from transmla.run.engine_check import check_engine
from transmla.sources.config import read_config

pytestmark = pytest.mark.serving
ENGINES = ("transformers", "vllm", "vllm-transformers", "llama.cpp")
PROMPTS, NEW_TOKENS = 20, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ.get("TRANSMLA_ROWS") or tmp_path_factory.mktemp("rows"))


def exported(name: str, folder: Path) -> Path:
    """The output directory of a row; what is there is not made again."""
    row, out = ROWS[name], folder / "".join(letter if letter.isalnum() else "_" for letter in name.lower())
    if row.missing is not None:
        pytest.skip(row.missing)
    for verb in ("convert", "export"):
        assert main([verb, *row.commanded(out)]) == 0
    return out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ROWS)
def test_a_cell_is_what_the_engine_does(name: str, engine: str, folder: Path, capsys) -> None:
    python = python_of(engine)
    out = exported(name, folder)
    reads = reading_of(engine, read_config(out / "exported", "verify")).reads
    try:
        found = check_engine(out, engine, python=python, prompts=PROMPTS, new_tokens=NEW_TOKENS)
    except RecipeError as refused:  # what llama.cpp would read wrongly becomes no file
        lines, good = [str(refused)], False
    else:
        lines = [f"{line.what}: {line.detail}" for line in found]
        good = all(line.good is not False for line in found)
    with capsys.disabled():
        print("", f"== {name} | {engine} | {'yes' if reads else 'no'}", *lines, sep="\n")
    assert good == reads, lines
