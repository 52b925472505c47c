"""A model of a given architecture with random weights, and a tokenizer of one token per byte."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource
from transmla.sources.config import source_config


def make_random_model(section: ModelSource, out: Path) -> None:
    """Random weights, wide enough that attention is not uniform, and a tokenizer of one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|end|>"
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([end, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end).save_pretrained(out)
    config = source_config(section)
    if config.vocab_size < len(alphabet) + 1:
        raise RecipeError("model.config.vocab_size", f"a random model has a token a byte: at least {len(alphabet) + 1}")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
