"""A checkpoint's tokenizer.json as llama.cpp's vocabulary: byte pairs by merges, or sentencepiece's by scores."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from transmla.errors import RecipeError
from transmla.export.gguf_pre_tokenizers import name_of
from transmla.files import read_json
from transmla.sources.tokenizer import load_tokenizer

SPACE = "▁"  # how sentencepiece writes a space


@dataclass
class Vocabulary:
    """What the file says of the tokenizer.

    model: `gpt2` for byte pairs, `llama` for sentencepiece's. pre: how text is cut before it is merged.
    tokens, types: by number, as many as the embedding has rows. scores: of sentencepiece's tokens, the earlier merged
    the higher. merges: of byte pairs, in order. prefix: whether a space is put before text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    prefix: bool = False
    first: bool = False
    last: bool = False
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, rows: int, key: str, pre: str | None = None) -> Vocabulary:
    """The vocabulary of a checkpoint whose embedding has `rows` rows. key: for errors.

    Args:
        pre: llama.cpp's name for the way text is cut, where the user knows it.

    Raises:
        RecipeError: llama.cpp would tokenize otherwise.
    """
    tokenizer = load_tokenizer(folder, key)
    content = read_json(folder / "tokenizer.json")
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise RecipeError(
            key,
            f"{folder} has no tokenizer.json, from which the vocabulary is made; load its tokenizer with transformers "
            "(AutoTokenizer.from_pretrained) and save it there (save_pretrained)",
        )
    model = content["model"]
    if model.get("type") != "BPE":
        raise RecipeError(key, f"its tokenizer is a {model.get('type')}, which is not written; byte pairs (BPE) are")
    found = _byte_pairs if _has_byte_level(content.get("pre_tokenizer")) else _sentencepiece
    tokens, types = _tokens(content, rows)
    vocabulary = found(content, tokens, types, key, pre)
    # What the tokenizer does, rather than what its files seem to say.
    text = tokenizer("a")["input_ids"]
    vocabulary.first, vocabulary.last = text[0] == tokenizer.bos_token_id, text[-1] == tokenizer.eos_token_id
    return vocabulary


def _tokens(content: dict[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    """Tokens and their kinds by number; numbers that no token has are filled."""
    own = {number: token for token, number in content["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    known = {*own.values(), *(entry["content"] for entry in added.values())}
    tokens, types = [], []
    for number in range(rows):
        if number in added:
            special = bool(added[number]["special"])
            tokens.append(added[number]["content"])
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        elif number in own:
            tokens.append(own[number])
            types.append(TokenType.NORMAL)
        else:
            name = f"[PAD{number}]"
            while name in known:  # llama.cpp ends where two tokens are the same
                name = f"[{name}]"
            tokens.append(name)
            types.append(TokenType.UNUSED)
    return tokens, types


def _byte_pairs(
    content: dict[str, Any], tokens: list[str], types: list[TokenType], key: str, pre: str | None
) -> Vocabulary:
    model, notes = content["model"], []
    name = pre or name_of(content["pre_tokenizer"], bool(model.get("ignore_merges")))
    if name is None:
        raise RecipeError(
            key,
            "its tokenizer cuts text before merging in a way that llama.cpp is not known to have (pre_tokenizer of "
            "tokenizer.json); where you know llama.cpp's name for it, give --pre NAME, and compare the tokens with "
            "transmla verify DIR --engine llama.cpp --gguf FILE",
        )
    normalizer = (content.get("normalizer") or {}).get("type")
    if normalizer == "NFC":
        notes.append(
            "llama.cpp does not compose characters (NFC) before it tokenizes; text that is composed is the same"
        )
    elif normalizer is not None:
        raise RecipeError(key, f"its tokenizer normalises text ({normalizer}), which llama.cpp does not")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not merges:  # llama.cpp wants at least one: this never applies
        merges = [f"{tokens[0]} {tokens[0]}"]
    return Vocabulary("gpt2", name, tokens, types, merges=merges, notes=notes)


def _sentencepiece(
    content: dict[str, Any], tokens: list[str], types: list[TokenType], key: str, pre: str | None
) -> Vocabulary:
    """The merges of a sentencepiece model as the scores that they came from."""
    model = content["model"]
    numbers = {token: number for number, token in enumerate(tokens)}
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    if not model.get("byte_fallback") or any(octet not in numbers for octet in octets):
        raise RecipeError(
            key, "its tokenizer has neither byte-level pairs nor a token for every byte, one of which llama.cpp needs"
        )
    prefix = _space_prefix(content, key)
    ranks: dict[str, int] = {}
    pairs: set[tuple[str, str]] = set()
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
        pairs.add((left, right))
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL} - set(octets)
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal and (left, right) not in pairs:
                raise RecipeError(
                    key,
                    f"its tokenizer does not merge {left!r} and {right!r} into {token!r}, which llama.cpp would do: it "
                    "merges whatever makes a token",
                )
    for octet in octets:
        types[numbers[octet]] = TokenType.BYTE
    if (unknown := model.get("unk_token")) in numbers:
        types[numbers[unknown]] = TokenType.UNKNOWN
    texts = [
        token.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    return Vocabulary("llama", pre or "default", texts, types, scores=scores, prefix=prefix)


def _space_prefix(content: dict[str, Any], key: str) -> bool:
    """Whether a space is put before text.

    Raises:
        RecipeError: text is prepared in another way than sentencepiece's.
    """
    normalizer = content.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    cut = content.get("pre_tokenizer") or {}
    prefix, other = cut.get("prepend_scheme") in ("always", "first"), []
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                other.append(step.get("type"))
    if cut and (cut.get("type") != "Metaspace" or cut.get("replacement") != SPACE):
        other.append(cut.get("type"))
    inner = [token for token in content["model"]["vocab"] if SPACE in token[1:] and token.strip(SPACE)]
    if cut.get("split", False) and inner:
        other.append("Metaspace that keeps words apart")
    if other:
        raise RecipeError(key, f"its tokenizer prepares text ({', '.join(map(str, other))}) as llama.cpp does not")
    return prefix


def _has_byte_level(step: dict[str, Any] | None) -> bool:
    steps = (step or {}).get("pretokenizers", [step or {}])
    return any(inner.get("type") == "ByteLevel" for inner in steps)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, folder: Path) -> None:
    """Write the vocabulary, the special tokens, the chat template, and what is put around a text."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    special = SpecialVocab(folder, n_vocab=len(vocabulary.tokens))
    special.add_special_token = {"bos": vocabulary.first, "eos": vocabulary.last}  # llama.cpp's defaults differ by kind
    others = [number for number in _ends(folder) if number != special.special_token_ids.get("eos")]
    for name, number in zip(("eot", "eom"), others, strict=False):
        special.special_token_ids.setdefault(name, number)
    special.add_to_gguf(writer, quiet=True)


def _ends(folder: Path) -> list[int]:
    """Tokens at which generation ends."""
    file = folder / "generation_config.json"
    ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return ends if isinstance(ends, list) else []
