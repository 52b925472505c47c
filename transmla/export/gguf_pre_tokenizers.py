"""How byte pair tokenizers cut text before they merge, and what llama.cpp calls each way.

llama.cpp has every way as code, under a name that the file gives (`tokenizer.ggml.pre`). A name is found by what
tokenizer.json says, so that a tokenizer of its own kind with a known way of cutting has one too.
"""

from __future__ import annotations

from typing import Any

NUMBER = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
)

# Patterns in turn, and whether a word that is a token as it stands is not cut (`ignore_merges`) -> llama.cpp's name.
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((NUMBER, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
    (DEEPSEEK_V3, False): "deepseek-v3",
}


def name_of(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str | None:
    """llama.cpp's name for a way of cutting, as tokenizer.json has it; None: it has none that is known here."""
    try:
        patterns = tuple(_plain(pattern) for pattern in _patterns(pre_tokenizer or {}))
    except KeyError:
        return None
    plain = {(tuple(map(_plain, known)), flag): name for (known, flag), name in NAMES.items()}
    return plain.get((patterns, ignore_merges))


def _patterns(step: dict[str, Any]) -> list[str]:
    """The patterns of a step in turn.

    Raises:
        KeyError: it does what no pattern here says.
    """
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return [pattern for inner in steps for pattern in _patterns(inner)]
        case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
            return [GPT2] if rest.get("use_regex", True) else []
        case {"type": "Digits", "individual_digits": True}:
            return [NUMBER]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return [pattern]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            return [pattern]
    raise KeyError(step.get("type"))


def _plain(pattern: str) -> str:
    """A pattern with its line ends written out: files have both forms."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")
