"""The tokenizer of a GGUF, as its header describes it.

Versions of transformers differ in what they read of a header, and none says so: with 5.17 a text of SmolLM2 ends with
the token that begins one, one of Qwen2.5 with another than its conversations do, and Gemma 3 has no first token, and
once it was saved no merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from transmla.errors import RecipeError
from transmla.files import edit_json
from transmla.recipe.model_source import TokenizerEdits

PREFIX = "tokenizer.ggml."
NUMBERS = {
    "bos_token": f"{PREFIX}bos_token_id",
    "eos_token": f"{PREFIX}eos_token_id",
    "unk_token": f"{PREFIX}unknown_token_id",
    "pad_token": f"{PREFIX}padding_token_id",
}
MODEL, ADD_BOS = f"{PREFIX}model", f"{PREFIX}add_bos_token"
GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast"}  # the class that takes a file as it is
PROBE = "Hello  world, it's déjà vu:\n\n\tif x <= y — \u2581 東京 🙂"  # without digits, which edits may split
SPLIT_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def follow_header(tokenizer: PreTrainedTokenizerBase, header: Mapping[str, Any]) -> None:
    """Give a tokenizer the special tokens, the first token and the bytes that a header names; what it does not name
    stays.

    Args:
        header: entries of the file, as `transmla.sources.gguf_header.tokenizer_entries` reads them.
    """
    for name, entry in NUMBERS.items():
        if (number := header.get(entry)) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(number)))
    tokenizer.clean_up_tokenization_spaces = False  # a text comes back as it was
    tokenizer.init_kwargs.pop("clean_up_tokenization_spaces", None)
    backend: Any = tokenizer
    if header.get(MODEL) == "gpt2":
        backend._tokenizer = _of_bytes(backend._tokenizer)
    if header.get(ADD_BOS) and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        first, number = str(tokenizer.bos_token), tokenizer.bos_token_id
        pair = f"{first} $A {first}:1 $B:1"
        backend._tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A", pair=pair, special_tokens=[(first, number)]
        )


def _of_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer whose vocabulary is of bytes written as letters, and which has nothing for what it does not know."""
    state = json.loads(tokenizer.to_str())
    model = {"byte_fallback": False, "fuse_unk": False, "unk_token": None}
    if all(state["model"].get(name) == value for name, value in model.items()) and state["decoder"] == BYTES:
        return tokenizer
    state["model"] |= model
    state["decoder"] = BYTES
    return Tokenizer.from_str(json.dumps(state))


def save_and_compare(tokenizer: PreTrainedTokenizerBase, edits: TokenizerEdits, folder: Path, key: str) -> None:
    """Write a tokenizer with a recipe's edits, beside the model's configuration, and see that it is read as it was.

    Args:
        key: of the section, for errors.

    Raises:
        RecipeError: this version of transformers reads another tokenizer than it wrote.
    """
    tokenizer.save_pretrained(folder)
    if edits.split_digits:
        edit_json(folder / "tokenizer.json", lambda content: content.update(pre_tokenizer=SPLIT_DIGITS))
    changes: dict[str, Any] = dict(GENERAL) if edits.split_digits else {}
    if edits.model_max_length is not None:
        changes["model_max_length"] = edits.model_max_length
    _change(folder, changes)
    if not _read_alike(tokenizer, folder):
        _change(folder, GENERAL)
        if not _read_alike(tokenizer, folder):
            raise RecipeError(
                f"{key}.source",
                "this version of transformers reads another tokenizer than it wrote of this GGUF; install a newer one",
            )


def _change(folder: Path, changes: Mapping[str, Any]) -> None:
    edit_json(folder / "tokenizer_config.json", lambda content: content.update(changes))


def _read_alike(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    alike = read.special_tokens_map == tokenizer.special_tokens_map
    return alike and read(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"]
