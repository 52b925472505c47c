"""A model of a given architecture with random weights, and a tokenizer of one token per byte."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from transmla.errors import RecipeError
from transmla.hardware import free_memory
from transmla.recipe.model_source import ModelSource
from transmla.sources.config import source_config
from transmla.sources.config_values import skeleton


def make_random_model(section: ModelSource, out: Path, key: str = "model") -> None:
    """Random weights, wide enough that attention is not uniform, and a tokenizer of one token a byte.

    Raises:
        RecipeError: the vocabulary has no room for the bytes, or memory none for the weights.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|end|>"
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([end, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end).save_pretrained(out)
    config = source_config(section, key)
    if config.vocab_size < len(alphabet) + 1:
        least = len(alphabet) + 1
        raise RecipeError(f"{key}.config.vocab_size", f"a random model has a token a byte; give at least {least}")
    needed = 4 * sum(value.numel() for value in skeleton(config, f"{key}.config").parameters())
    if needed > (free := free_memory(torch.device("cpu"))):
        needs = f"{needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        raise RecipeError(f"{key}.config", f"random weights of this architecture need {needs}; take a smaller one")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(out)
