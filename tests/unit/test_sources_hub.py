"""Sources of the hub, against the tests' own: which files are downloaded, and what is refused in which words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub_server import HubServer
from tests.source_folder import copy_of, edit_json, make_source, shard
from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource
from transmla.sources import hub
from transmla.sources.fetch import fetch
from transmla.sources.hub_commits import commit_of

READ = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("TRANSMLA_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        forget()
        yield server
        forget()


def forget() -> None:
    """As in another process."""
    hub._asked_once.cache_clear()
    commit_of.cache_clear()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model")


def refused(source: str, **fields: str) -> str:
    forget()
    with pytest.raises(RecipeError) as error:
        fetch(ModelSource(source=source, **fields))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_the_index_names_is_downloaded_and_nothing_else(server: HubServer, tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "model")
    shards = [file.name for file in shard(folder)]
    for name in ("consolidated.safetensors", "pytorch_model.bin", "training_args.bin", "README.md", "own.py"):
        (folder / name).write_bytes(b"\0" * 1000)
    for name in ("original/consolidated.00.pth", "onnx/model.safetensors", "checkpoint-1/config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"\0" * 1000)
    commit = server.add_model("org/tiny", folder)
    found = fetch(ModelSource(source="org/tiny"))
    names = [*READ, *shards, "model.safetensors.index.json", "README.md"]  # a card may be anything
    sizes = {name: (folder / name).stat().st_size for name in names}
    assert server.downloads("org/tiny") == sizes
    assert found.name == commit == commit_of("org/tiny", None, "model")
    seen = len(server.log)
    assert fetch(ModelSource(source="org/tiny")) == found and server.downloads("org/tiny") == sizes
    assert len(server.log) <= seen + 1


def test_a_revision_is_one_commit(server: HubServer, tiny: Path, tmp_path: Path) -> None:
    """A branch that moves is another source; a commit is the same for ever."""
    old = server.add_model("org/tiny", tiny)
    first = fetch(ModelSource(source="org/tiny"))
    edit_json(copy_of(tiny, tmp_path / "new") / "config.json", rope_theta=5e5)
    new = server.add_model("org/tiny", tmp_path / "new", revisions={"side": tmp_path / "new"})
    assert commit_of("org/tiny", None, "model") == old == first.name  # of this process
    forget()
    assert commit_of("org/tiny", None, "model") == new != old
    assert fetch(ModelSource(source="org/tiny", revision=old)) == first
    assert fetch(ModelSource(source="org/tiny", revision="side")).name == new
    assert refused("org/tiny", revision="none").startswith("model.revision: org/tiny has no revision 'none'")


def test_a_cut_download_goes_on(server: HubServer, tiny: Path) -> None:
    server.add_model("org/tiny", tiny)
    server.cut("org/tiny", "model.safetensors", after=1000)
    folder = fetch(ModelSource(source="org/tiny"))
    assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_without_the_hub(server: HubServer, tiny: Path, monkeypatch) -> None:
    """Down, or told to be offline: with the model in the cache, with half of it, with nothing of it."""
    server.add_model("org/tiny", tiny)
    server.add_model("org/half", tiny)
    folder = fetch(ModelSource(source="org/tiny"))
    hub.config_folder(ModelSource(source="org/half"), "model")
    server.down()
    forget()
    assert fetch(ModelSource(source="org/tiny")) == folder
    assert commit_of("org/tiny", None, "model") == folder.name
    assert "503" in refused("org/half")
    assert "503" in refused("org/none")
    seen = len(server.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    assert fetch(ModelSource(source="org/tiny")) == folder
    for name in ("org/half", "org/none"):
        assert f"cannot download {name}: HF_HUB_OFFLINE is set" in refused(name)
    assert len(server.log) == seen


def test_repositories_that_cannot_be_read(server: HubServer, tiny: Path) -> None:
    for name in ("org/mine", "org/terms", "org/old"):
        server.add_model(name, tiny)
    server.private("org/mine")
    server.gated("org/terms")
    server.rename("org/old", "org/new")
    assert "there is no model org/none" in refused("org/none")
    assert "set HF_TOKEN if it is private" in refused("org/mine")
    assert "is gated; accept its terms" in refused("org/terms")
    assert "no hub id; give ORG/NAME" in refused("a/b/c")
    forget()
    assert (fetch(ModelSource(source="org/old")) / "model.safetensors").is_file()


def test_weights_that_are_not_read_are_not_downloaded(server: HubServer, tiny: Path) -> None:
    small = {name: (tiny / name).read_bytes() for name in READ}
    heavy = b"\0" * 1000
    index = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    quantised = json.dumps(json.loads(small["config.json"]) | {"quantization_config": {"quant_method": "awq"}})
    cases = {
        "bin": (small | {"pytorch_model.bin": heavy}, "pickled weights alone (pytorch_model.bin)"),
        "pth": (small | {"consolidated.00.pth": heavy}, "pickled weights alone"),
        "gguf": (small | {"model-q4.gguf": heavy}, "give the path of a file such as model-q4.gguf"),
        "mistral": (small | {"consolidated.safetensors": heavy}, "has neither model.safetensors nor"),
        "lost": (small | {"model.safetensors.index.json": index}, "lacks model-1.safetensors"),
        "awq": (small | {"config.json": quantised.encode(), "model.safetensors": heavy}, "quantised"),
        "empty": ({"README.md": b"# soon"}, "has no config.json"),
        "adapter": (small | {"adapter_config.json": b"{}", "model.safetensors": heavy}, "is an adapter"),
    }
    for name, (files, reason) in cases.items():
        server.add_model(f"org/{name}", files)
        assert reason in refused(f"org/{name}"), name
        assert len(heavy) not in server.downloads(f"org/{name}").values()


def test_a_full_disk(server: HubServer, tiny: Path, monkeypatch) -> None:
    from collections import namedtuple

    server.add_model("org/tiny", tiny)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "total used free")(10, 10, 0))
    assert "model.source: 0.0 GiB are needed below" in refused("org/tiny")
    assert "model.safetensors" not in server.downloads("org/tiny")
