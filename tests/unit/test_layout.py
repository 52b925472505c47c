"""The house: the order of imports, names that say one thing, nothing that is only begun."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "transmla").rglob("*.py"))


def test_imports_run_downwards(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


def test_few_modules_lie_at_the_top_and_none_is_long() -> None:
    assert len(list((ROOT / "transmla").glob("*.py"))) <= 8
    assert {path.name: lines for path in MODULES if (lines := len(path.read_text().splitlines())) > 300} == {}


def test_a_file_name_means_one_file() -> None:
    names = Counter(path.stem for path in MODULES if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []


def test_nothing_is_a_stub() -> None:
    for path in MODULES:
        raised = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise) and node.exc]
        assert "NotImplementedError" not in " ".join(ast.unparse(node) for node in raised), path


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["recover", "recipe=debug", "sed=1"],
        ["recover", "recipe=debug", "recover.0.trainer.lerning_rate=1"],
        ["recover", "recipe=unknown"],
    ],
)
def test_help_and_a_wrong_key_import_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys; from transmla.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'hydra'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if words == ["--help"] else 2), done.stderr
    assert len(done.stderr.splitlines()) == done.returncode // 2


def test_the_package_registers_when_the_auto_classes_are_asked(tmp_path) -> None:
    """In either order of imports, and nothing heavy is imported before."""
    (tmp_path / "config.json").write_text('{"model_type": "mla_llama"}')
    before = "import sys, transmla; assert 'transformers' not in sys.modules; from transformers import AutoConfig"
    after = "from transformers import AutoConfig; import transmla"
    ask = f"; assert type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__ == 'MLALlamaConfig'"
    ask += "; assert AutoConfig.for_model('mla_qwen2').model_type == 'mla_qwen2'"
    for order in (before, after):
        done = subprocess.run([sys.executable, "-c", order + ask], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
