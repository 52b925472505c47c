"""The tokenizer of a GGUF is what its header says, whatever transformers makes of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transmla.errors import RecipeError
from transmla.recipe.model_source import TokenizerEdits
from transmla.sources import tokenizer_of_gguf
from transmla.sources.tokenizer_of_gguf import follow_header, save_and_compare

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *LETTERS, "ll", "llo"])}
HEADER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
}
TEXT = "llo ,  déjà vu \u2581 x"


def as_5_17_makes_it() -> PreTrainedTokenizerFast:
    """A vocabulary of bytes that is taken for one of sentencepiece, as transformers 5.17 takes SmolLM2's; its text ends
    with the token that begins one."""
    bpe = models.BPE(VOCABULARY, [("l", "l"), ("ll", "o")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("\u2581", " "), decoders.ByteLevel()]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    names = {"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=True, **names)


def test_special_tokens_and_bytes_are_the_headers() -> None:
    tokenizer = as_5_17_makes_it()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<s>", None)
    follow_header(tokenizer, HEADER)
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
    assert named == ("<s>", "</s>", "<unk>", "</s>")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert state["decoder"]["type"] == "ByteLevel" and not state["model"]["byte_fallback"]
    ids = tokenizer(TEXT)["input_ids"]
    assert ids[0] == VOCABULARY["llo"] and tokenizer.decode(ids) == TEXT


def test_what_the_header_does_not_name_stays() -> None:
    tokenizer = as_5_17_makes_it()
    follow_header(tokenizer, {})
    assert tokenizer.eos_token == "<s>" and tokenizer.pad_token is None
    assert tokenizer("ll")["input_ids"] == [VOCABULARY["ll"]]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_first_token(wanted: bool, tmp_path: Path) -> None:
    tokenizer = as_5_17_makes_it()
    follow_header(tokenizer, HEADER | {"tokenizer.ggml.add_bos_token": wanted})
    first = [1] if wanted else []
    assert tokenizer("ll")["input_ids"] == [*first, VOCABULARY["ll"]]
    save_and_compare(tokenizer, TokenizerEdits(), tmp_path, "model")
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read("ll")["input_ids"] == [*first, VOCABULARY["ll"]] and read.eos_token == "</s>"
    follow_header(tokenizer, HEADER | {"tokenizer.ggml.add_bos_token": wanted})  # once is enough
    assert tokenizer("ll")["input_ids"] == [*first, VOCABULARY["ll"]]


class LosesMerges:
    """AutoTokenizer of a version whose own class for a model loses merges when it reads a file, or always does."""

    def __init__(self, classes: set[str]) -> None:
        self.classes = classes

    def from_pretrained(self, folder: Path, **options: object) -> PreTrainedTokenizerFast:
        name = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
        content = json.loads((folder / "tokenizer.json").read_text())
        if name in self.classes:
            content["model"]["merges"] = []
        read = AutoTokenizer.from_pretrained(folder)
        read._tokenizer = Tokenizer.from_str(json.dumps(content))
        return read


def test_what_a_class_reads_otherwise_is_read_by_the_general_one(tmp_path: Path, monkeypatch) -> None:
    tokenizer = as_5_17_makes_it()
    follow_header(tokenizer, HEADER)
    saved = type(tokenizer).__name__
    tokenizer.save_pretrained(tmp_path)
    own = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    monkeypatch.setattr(tokenizer_of_gguf, "AutoTokenizer", LosesMerges({own, saved} - {"PreTrainedTokenizerFast"}))
    save_and_compare(tokenizer, TokenizerEdits(), tmp_path, "model")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    monkeypatch.setattr(tokenizer_of_gguf, "AutoTokenizer", LosesMerges({own, saved, "PreTrainedTokenizerFast"}))
    with pytest.raises(RecipeError, match=r"model\.source: this version of transformers reads another tokenizer"):
        save_and_compare(tokenizer, TokenizerEdits(), tmp_path, "model")
