"""Real clients against the test hub: huggingface_hub in this process, transformers and datasets in a fresh one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.hub_server import HubServer

CARD = """---
tags: [tiny]
configs:
- config_name: easy
  data_files: [{split: train, path: easy/*.parquet}, {split: test, path: easy-test.parquet}]
- config_name: hard
  data_files: hard.parquet
---
# Sums
"""
MODELS = """
import json
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("org/tiny")
print(json.dumps({
    "hidden": AutoConfig.from_pretrained("org/tiny").hidden_size,
    "sum": model.lm_head.weight.sum().item(),
    "ids": AutoTokenizer.from_pretrained("org/tiny")("b a")["input_ids"],
}))
"""
DATASETS = """
import json, sys
from datasets import load_dataset, load_dataset_builder

found = {"easy": load_dataset("org/sums", "easy", split="train")["a"][:]}
found["lines"] = load_dataset("org/lines")["train"]["a"][:]
if sys.argv[1] == "online":
    found["test"] = load_dataset("org/sums", "easy", split="test")["a"][:]
    found["hard"] = load_dataset("org/sums", "hard", split="train")["a"][:]
    found["configs"] = sorted(load_dataset_builder("org/sums", "hard").builder_configs)
    export = load_dataset("org/lines", data_dir="default", revision="refs/convert/parquet", split="train")
    found["export"] = export["a"][:]
    found["files"] = load_dataset("org/lines", data_files="extra/*.jsonl", split="train")["a"][:]
    for name, rows in (
        ("streamed parquet", load_dataset("org/sums", "easy", split="train", streaming=True)),
        ("streamed lines", load_dataset("org/lines", split="train", streaming=True)),
    ):
        found[name] = [row["a"] for row in rows]
print(json.dumps(found))
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with a tokenizer of four words."""
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>").save_pretrained(folder)
    return folder


def client(code: str, server: HubServer, home: Path, *arguments: str, offline: bool = False) -> dict[str, object]:
    """What a fresh process prints that sees the hub through its environment only."""
    environment = server.environment(home, offline=offline)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def lines(*values: int) -> bytes:
    return "".join(f'{{"a": {value}}}\n' for value in values).encode()


def parquet(*values: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": list(values)}), sink)
    return sink.getvalue().to_pybytes()


def test_transformers_loads_and_loads_again_without_the_hub(server: HubServer, tiny: Path, tmp_path: Path) -> None:
    server.add_model("org/tiny", tiny)
    found = client(MODELS, server, tmp_path)
    assert (found["hidden"], found["ids"]) == (32, [3, 2])
    assert found["sum"] == pytest.approx(LlamaForCausalLM.from_pretrained(tiny).lm_head.weight.sum().item())
    assert server.downloads("org/tiny")["model.safetensors"] == (tiny / "model.safetensors").stat().st_size
    seen = len(server.log)
    assert client(MODELS, server, tmp_path, offline=True) == found
    assert len(server.log) == seen


def test_datasets_reads_subsets_streams_and_branches(server: HubServer, tmp_path: Path) -> None:
    sums = {
        "README.md": CARD.encode(),
        "easy/0.parquet": parquet(1, 2),
        "easy/1.parquet": parquet(3),
        "easy-test.parquet": parquet(4),
        "hard.parquet": parquet(5, 6),
    }
    server.add_dataset("org/sums", sums)
    export = {"default/train/0000.parquet": parquet(8)}
    text = {"train.jsonl": lines(8, 9), "extra/more.jsonl": lines(7)}
    server.add_dataset("org/lines", text, revisions={"refs/convert/parquet": export})
    found = client(DATASETS, server, tmp_path, "online")
    kept = {"easy": [1, 2, 3], "lines": [8, 9]}
    assert found == kept | {
        "test": [4],
        "hard": [5, 6],
        "configs": ["easy", "hard"],
        "export": [8],
        "files": [7],
        "streamed parquet": [1, 2, 3],
        "streamed lines": [8, 9],
    }
    seen = len(server.log)
    assert client(DATASETS, server, tmp_path, "offline", offline=True) == kept
    assert len(server.log) == seen


def test_snapshot_takes_what_the_patterns_allow_at_the_pinned_commit(
    server: HubServer, tiny: Path, tmp_path: Path
) -> None:
    old = server.add_model("org/tiny", tiny, revisions={"half": {"config.json": b"{}"}})
    new = server.add_model("org/tiny", {"config.json": b"new", "sub/x.txt": b"x"})
    fetch = dict(repo_id="org/tiny", endpoint=server.endpoint, cache_dir=tmp_path, token=False)
    first = Path(snapshot_download(**fetch, revision=old, allow_patterns=["*.safetensors", "config.json"]))
    assert sorted(server.downloads("org/tiny")) == ["config.json", "model.safetensors"]
    assert first.name == old
    assert (first / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    latest = Path(snapshot_download(**fetch))
    assert (latest.name, (latest / "sub" / "x.txt").read_bytes()) == (new, b"x")
    assert Path(snapshot_download(**fetch, revision="half")).name == server.commit("org/tiny", "half")


def test_facts_trees_and_paths(server: HubServer) -> None:
    server.page = 2
    files = {"README.md": CARD.encode(), "a/b/c.bin": b"12345", "a/d.txt": b"1", "e.txt": b""}
    commit = server.add_dataset("org/sums", files, revisions={"refs/convert/parquet": {}})
    api = HfApi(endpoint=server.endpoint, token=False)
    info = api.dataset_info("org/sums", files_metadata=True)
    assert (info.sha, info.tags, [config["config_name"] for config in info.card_data["configs"]]) == (
        commit,
        ["tiny"],
        ["easy", "hard"],
    )
    assert {file.rfilename: (file.size, file.lfs is not None) for file in info.siblings or []}["a/b/c.bin"] == (5, True)
    tree = list(api.list_repo_tree("org/sums", repo_type="dataset", recursive=True))
    assert [entry.path for entry in tree] == ["README.md", "a", "a/b", "a/b/c.bin", "a/d.txt", "e.txt"]
    inner = list(api.list_repo_tree("org/sums", "a/b", repo_type="dataset", expand=True))
    assert isinstance(inner[0], RepoFile) and inner[0].last_commit and inner[0].last_commit.oid == commit
    kinds = {
        entry.path: type(entry) for entry in api.get_paths_info("org/sums", ["a", "e.txt", "no"], repo_type="dataset")
    }
    assert kinds == {"a": RepoFolder, "e.txt": RepoFile}
    refs = api.list_repo_refs("org/sums", repo_type="dataset")
    assert [ref.target_commit for ref in refs.branches] == [commit]
    assert [ref.ref for ref in refs.converts] == ["refs/convert/parquet"]
    assert [entry.commit_id for entry in api.list_repo_commits("org/sums", repo_type="dataset")] == [commit]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("org/sums", "no", repo_type="dataset"))


def test_a_private_and_a_gated_repository_want_the_token(server: HubServer, tmp_path: Path) -> None:
    server.add_model("org/mine", {"config.json": b"{}"})
    server.private("org/mine")
    server.add_model("org/terms", {"config.json": b"{}"})
    server.gated("org/terms")
    fetch = dict(filename="config.json", endpoint=server.endpoint, cache_dir=tmp_path)
    for token in (False, "hf_other"):
        with pytest.raises(RepositoryNotFoundError) as private:
            hf_hub_download("org/mine", **fetch, token=token)
        with pytest.raises(GatedRepoError) as gated:
            hf_hub_download("org/terms", **fetch, token=token)
        assert (private.value.response.status_code, gated.value.response.status_code) == (401, 403 if token else 401)
    for name in ("org/mine", "org/terms"):
        assert Path(hf_hub_download(name, **fetch, token=server.token)).read_bytes() == b"{}"
    assert HfApi(endpoint=server.endpoint, token=server.token).whoami()["name"] == "tester"
    with pytest.raises(HfHubHTTPError):
        HfApi(endpoint=server.endpoint).whoami("hf_other")


def test_a_renamed_repository_redirects(server: HubServer, tmp_path: Path) -> None:
    server.add_model("old/name", {"config.json": b"{}"})
    server.rename("old/name", "new/name")
    api = HfApi(endpoint=server.endpoint, token=False)
    assert api.model_info("old/name").id == "new/name"
    assert api.get_paths_info("old/name", "config.json")[0].path == "config.json"
    snapshot_download("old/name", endpoint=server.endpoint, cache_dir=tmp_path, token=False)
    assert server.downloads("new/name") == {"config.json": 2}
    assert server.downloads("old/name") == {}


def test_a_cut_download_resumes_where_it_broke_off(server: HubServer, tmp_path: Path) -> None:
    content = bytes(range(256)) * (12 << 12)  # 12 MiB; the client keeps whole steps of 10 MiB
    server.add_model("org/big", {"model.safetensors": content})
    server.cut("org/big", "model.safetensors", after=11 << 20)
    path = hf_hub_download("org/big", "model.safetensors", endpoint=server.endpoint, cache_dir=tmp_path, token=False)
    assert Path(path).read_bytes() == content
    gets = [(request.status, request.range, request.sent >> 20) for request in server.log if request.method == "GET"]
    assert gets == [(200, None, 11), (206, f"bytes={10 << 20}-", 2)]


def test_what_is_missing_and_a_hub_that_is_down(server: HubServer, tmp_path: Path) -> None:
    server.add_model("org/tiny", {"config.json": b"{}"})
    fetch = dict(endpoint=server.endpoint, cache_dir=tmp_path, token=False)
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("org/none", **fetch)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("org/tiny", **fetch, revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("org/tiny", "none.json", **fetch)
    server.down()
    with pytest.raises(HfHubHTTPError, match="503"):
        HfApi(endpoint=server.endpoint, token=False).model_info("org/tiny")
    server.up()
    assert Path(hf_hub_download("org/tiny", "config.json", **fetch)).read_bytes() == b"{}"
    server.down()
    assert Path(hf_hub_download("org/tiny", "config.json", **fetch)).read_bytes() == b"{}"
