"""`transmla push`: what reaches the hub, and what is refused before anything does."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from transformers import AutoModelForCausalLM

from tests.conftest import quickly
from tests.hub_server import HubServer
from transmla.cli import main
from transmla.files import damage, save_manifest
from transmla.recipe.validation import validate_recipe

SECRET = "hf_0123456789abcdefgh"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose recipe names files by their place on this machine."""
    folder = tmp_path_factory.mktemp("machine")
    text = folder / "held.jsonl"
    text.write_text("".join(json.dumps({"text": f"The sea was calm on day {day}. " * 12}) + "\n" for day in range(40)))
    words = [f"evaluate.data=[{text}]", f"output_dir={folder / 'run'}", "evaluate.prompts=['/think of the sea']"]
    with quickly():
        assert main(["recover", "recipe=debug", "device=cpu", *words]) == 0
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "elsewhere"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        server.allowed.add("org")
        yield server


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["push", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: push: ") and line.count("\n") == 1
    return line


def texts(folder: Path) -> dict[str, str]:
    return {
        file.name: file.read_text() for file in folder.rglob("*") if file.suffix in (".json", ".yaml", ".md", ".jinja")
    }


def test_a_whole_upload(run: Path, made: Path, server: HubServer, tmp_path: Path, capsys) -> None:
    capsys.readouterr()
    assert main(["push", str(run), "org/tiny"]) == 0
    printed = capsys.readouterr().out
    found = Path(snapshot_download("org/tiny", cache_dir=tmp_path / "hub", token=server.token))
    files = {str(file.relative_to(found)): file.read_bytes() for file in found.rglob("*") if file.is_file()}
    listed = {line.split()[2]: line.split()[1] for line in printed.splitlines() if len(line.split()) == 3}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} == listed
    assert damage(found) is None and set(json.loads(files["manifest.json"])) == set(files) - {"manifest.json"}
    assert files["model.safetensors"] == (run / "exported" / "model.safetensors").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(found).config.model_type == "deepseek_v3"
    assert HfApi(token=server.token).model_info("org/tiny").private
    assert server.commit("org/tiny") in printed and server.uploads.messages == ["debug, exported by TransMLA 0.1.0"]
    for name, text in texts(found).items():
        assert not any(path in text for path in (str(made.parent), str(run), str(Path.home()), str(Path.cwd()))), name
    tree = yaml.safe_load(files["recipe.yaml"])
    assert (tree["output_dir"], tree["evaluate"]["data"]) == ("run", ["held.jsonl"])
    assert tree["evaluate"]["prompts"] == ["/think of the sea"]
    assert validate_recipe(tree).name == "debug"
    card = files["README.md"].decode()
    assert 'from_pretrained("org/tiny"' in card and "ORG/NAME" not in card
    assert "## Quality on held.jsonl" in card
    (program,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    exec(program.replace("org/tiny", str(found)), {})  # the card's commands are those that work
    assert len(capsys.readouterr().out) > 20


def test_the_folder_stays_as_it_was(run: Path, server: HubServer) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert main(["push", str(run / "exported"), "org/tiny"]) == 0
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_what_belonged_to_an_earlier_model_goes(run: Path, server: HubServer, capsys) -> None:
    """Old shards beside a new file would be loaded with it or in its place; what others put there stays."""
    assert main(["push", str(run), "org/tiny"]) == 0
    api = HfApi(token=server.token)
    more = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "chat_template.jinja",
        "figures/old.png",
    ]
    kept = ["notes.md", "tiny-q8_0.gguf", "other/model.safetensors"]
    api.create_commit(
        "org/tiny", [CommitOperationAdd(name, b"{}") for name in [*more, *kept]], commit_message="by hand"
    )
    capsys.readouterr()
    assert main(["push", str(run), "org/tiny"]) == 0
    assert "; removed " in capsys.readouterr().out
    there = set(api.list_repo_files("org/tiny"))
    assert not there & set(more) and there >= set(kept)


def test_a_branch(run: Path, server: HubServer) -> None:
    for _ in range(2):  # made, then there
        assert main(["push", str(run), "org/tiny", "--revision", "gla-2", "--public"]) == 0
    api = HfApi(token=server.token)
    assert "model.safetensors" in api.list_repo_files("org/tiny", revision="gla-2")
    assert api.list_repo_files("org/tiny") == []
    assert not api.model_info("org/tiny").private


def test_repositories_that_are_not_written_to(run: Path, server: HubServer, monkeypatch, capsys) -> None:
    tiny = {"model.safetensors": b"\0" * 10, "config.json": b"{}"}
    server.add_model("org/public", {"README.md": b"# soon"})
    server.add_model("org/other", tiny)
    server.add_model("org/mine", {"README.md": b"# soon"})
    server.private("org/mine")
    before = {name: server.commit(name) for name in ("org/public", "org/other", "org/mine")}
    cases = {
        ("org/public",): "is there and public; add --public",
        ("org/mine", "--public"): "is there and private; make it public on its page",
        ("org/other", "--public"): "holds another model, which this would replace",
        ("stranger/tiny",): "the token may not write to stranger/tiny",
        ("tiny",): "names no owner; give ORG/NAME",
        ("a/b/c",): "cannot be a repository",
        ("org/--x",): "cannot be a repository",
    }
    for words, reason in cases.items():
        assert reason in refused(capsys, str(run), *words), words
    assert before == {name: server.commit(name) for name in before}
    server.down()
    assert "503" in refused(capsys, str(run), "org/tiny")
    server.up()
    seen = len(server.log)
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(capsys, str(run), "org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, str(run), "org/tiny")
    assert len(server.log) == seen


def edit(file: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def damaged(run: Path) -> None:
    file = run / "exported" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def unverified(run: Path) -> None:
    edit(run / "exported" / "transmla.json", lambda tree: tree.pop("max_abs_logprob_diff"))
    save_manifest(run / "exported")


def missed(run: Path) -> None:
    entry = {"requirement": "kl of exported on held <= 0.1", "met": False, "value": 0.3}
    edit(run / "report.json", lambda tree: tree.update(required=[entry]))


def in_card(text: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        card = run / "exported" / "README.md"
        card.write_text(f"{card.read_text()}\n{text}\n")

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / "exported" / name).unlink()


@pytest.mark.parametrize(
    "change, reason",
    [
        (damaged, "is damaged: model.safetensors has another content"),
        (without("tokenizer.json"), "is damaged: tokenizer.json is missing"),
        (without("manifest.json"), "is damaged: manifest.json is missing"),
        (without("transmla.json"), "is no exported folder"),
        (without("README.md"), "has no card (README.md)"),
        (unverified, "was never compared with its student"),
        (missed, "a threshold of the recipe was missed (kl of exported on held <= 0.1)"),
        (in_card(f"my token is {SECRET}"), "credentials or a token stand in README.md"),
        (in_card("the key is a-very-secret-word"), "the value of the environment variable SOME_API_KEY stands in"),
        (in_card("made in {home}/work"), "names {home} of this machine in line"),
        (lambda run: (run / "exported" / "README.md").write_text("---\na: [\n---\n"), "no metadata that the hub reads"),
    ],
)
def test_folders_that_are_refused(
    run: Path, server: HubServer, monkeypatch, capsys, change: Callable[[Path], object], reason: str
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-very-secret-word")
    monkeypatch.setenv("HOME", "/home/somebody")
    change(run)
    card = run / "exported" / "README.md"
    if card.is_file():
        card.write_text(card.read_text().replace("{home}", "/home/somebody"))
    for words in ([], ["--dry-run"]):
        line = refused(capsys, str(run), "org/tiny", *words)
        assert reason.replace("{home}", "/home/somebody") in line
        assert SECRET not in line and "a-very-secret-word" not in line
    assert not server.log


def test_other_folders_are_refused(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (run / "recovered", tmp_path / "empty"):
        assert "is no exported folder" in refused(capsys, str(folder), "org/tiny", "--dry-run")
    assert "is no directory" in refused(capsys, str(tmp_path / "none"), "org/tiny")


def test_words_that_are_none(capsys) -> None:
    for words in (["."], [".", "org/tiny", "--privat"], [".", "org/tiny", "more"]):
        assert "transmla push --help" in refused(capsys, *words)
    assert main(["push", "--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out


def test_a_dry_run_needs_neither_token_nor_network(run: Path, monkeypatch, tmp_path: Path, capsys) -> None:
    (run / "exported" / "model-q8_0.gguf").write_bytes(b"GGUF")
    (run / "exported" / "LICENSE").write_text("MIT License\n")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def no_network(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    capsys.readouterr()
    assert main(["push", str(run), "org/tiny", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    weights = (run / "exported" / "model.safetensors").read_bytes()
    assert f"{len(weights):,}  {hashlib.sha256(weights).hexdigest()}  model.safetensors" in {
        line.strip() for line in lines
    }
    assert any(line.endswith("  LICENSE") for line in lines)
    assert "left out: model-q8_0.gguf" in lines
    assert "Nothing was uploaded. It would go to org/tiny, private, revision main." in lines
    assert "no token" in lines[-1]
