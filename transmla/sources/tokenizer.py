"""The source's tokenizer, read without code of its repository, and none whose tokens the model does not have."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from transmla.errors import RecipeError
from transmla.sources.config import read_config
from transmla.sources.config_file import one_line
from transmla.sources.safetensors_header import DamagedFileError, require_content

# Each set of files is a whole tokenizer; the first that is there decides.
WHOLE = (("tokenizer.json",), ("tekken.json",), ("vocab.json", "merges.txt"))
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
FROM_ORIGINAL = "copy the tokenizer's files from the model that it belongs to"


_checked: dict[Path, PreTrainedTokenizerBase] = {}  # a large one takes seconds to read


def check_tokenizer(folder: Path, key: str) -> None:
    """Read the tokenizer of a model directory, and keep it until `load_tokenizer` asks for it. key: for errors.

    Raises:
        RecipeError: there is none that can be read, it is code of the repository, or has tokens beyond the model's.
    """
    _checked[folder] = _read(folder, key)


def load_tokenizer(folder: Path, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; errors as of `check_tokenizer`."""
    checked = _checked.pop(folder, None)
    return _read(folder, key) if checked is None else checked


def _read(folder: Path, key: str) -> PreTrainedTokenizerBase:
    _check_files(folder, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception; transformers many kinds
        reason = one_line(error)
        if not _whole(folder):
            reason = f"it is a sentencepiece model alone, which its package reads (pip install sentencepiece): {reason}"
        raise RecipeError(key, f"cannot read the tokenizer of {folder}: {reason}; {FROM_ORIGINAL}") from None
    _check_vocabulary(tokenizer, read_config(folder, key).vocab_size, folder, key)
    return tokenizer


def _whole(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in WHOLE)


def _check_files(folder: Path, key: str) -> None:
    """transformers makes a tokenizer of three tokens where the files are missing."""
    if not _whole(folder) and not any((folder / name).is_file() for name in SENTENCEPIECE):
        raise RecipeError(key, f"{folder} has no tokenizer (tokenizer.json); {FROM_ORIGINAL}")
    for name in {*(name for names in WHOLE for name in names), *SENTENCEPIECE}:
        if (folder / name).is_file():
            try:
                require_content(folder / name)
            except DamagedFileError as error:
                raise RecipeError(key, f"{error}; {FROM_ORIGINAL}") from None
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
        own, name = content.get("auto_map"), content.get("tokenizer_class")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise RecipeError(key, f"{settings} is no JSON object: {one_line(error)}; {FROM_ORIGINAL}") from None
    if own and (not isinstance(name, str) or tokenizer_class_from_name(name) is None):
        raise RecipeError(
            key,
            f"{settings} names a tokenizer ({name}) that is code of its own, which is never run; {FROM_ORIGINAL}",
        )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path, key: str) -> None:
    """Every token that text can become has a row of the embedding.

    A special token beyond it that nothing writes is let be: Gemma 3's text models have one for images.
    """
    written = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    templates = tokenizer.chat_template or ""
    idle = {
        str(token.content)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content not in written and token.content not in str(templates)
    }
    beyond = sorted(
        (number, token) for token, number in tokenizer.get_vocab().items() if number >= rows and token not in idle
    )
    if beyond:
        number, token = beyond[0]
        count = f"{len(beyond)} token{'s' * (len(beyond) != 1)}"
        raise RecipeError(
            key,
            f"the tokenizer of {folder} has {count} that the model does not know ({token!r} is number {number}, the "
            f"model has {rows}); {FROM_ORIGINAL}, or resize the model's embedding",
        )
