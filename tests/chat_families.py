"""Tokenizers of one token per byte with the chat templates, and the special tokens, of families of models."""

from __future__ import annotations

from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(trl.__file__).parent / "chat_templates"  # as the models ship them

SPECIAL = {
    "deepseek_r1_distill": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
    "qwen2_5": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "qwen3": ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>"],
}


def letters_tokenizer(
    special: list[str], *, template: str | None = None, bos: str | None = None, eos: str | None = None, adds: str = "$A"
) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte. adds: what it makes of a text by itself, as TemplateProcessing has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    tokens = [(token, inner.token_to_id(token)) for token in special]
    if adds != "$A":
        inner.post_processor = processors.TemplateProcessing(single=adds, special_tokens=tokens)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)
    made.chat_template = template
    return made


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's chat template, as its models ship it, and its special tokens."""
    tokens = SPECIAL[family]
    return letters_tokenizer(
        [*tokens, "<think>", "</think>"],
        template=(TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"),
        bos=tokens[0] if family == "deepseek_r1_distill" else None,
        eos=tokens[1],
    )
