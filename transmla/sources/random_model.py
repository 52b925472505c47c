"""A model of a given architecture with random weights, and a tokenizer of one token per byte."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from transmla.errors import RecipeError
from transmla.hardware import free_memory
from transmla.recipe.model_source import ModelSource
from transmla.sources.config import source_config
from transmla.sources.config_values import skeleton
from transmla.sources.drawn_parts import drawn_model
from transmla.sources.layered_model import save_configuration
from transmla.sources.weight_shards import WeightShards


def make_random_model(section: ModelSource, out: Path, key: str = "model") -> None:
    """Random weights, wide enough that attention is not uniform, and a tokenizer of one token a byte.

    Raises:
        RecipeError: the vocabulary has no room for the bytes, or memory none for the weights.
    """
    config = source_config(section, key)
    byte_tokenizer(config, key).save_pretrained(out)
    needed = 4 * sum(value.numel() for value in skeleton(config, f"{key}.config").parameters())
    if needed > (free := free_memory(torch.device("cpu"))):
        needs = f"{needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        raise RecipeError(f"{key}.config", f"random weights of this architecture need {needs}; take a smaller one")
    source = drawn_model(config, torch.float32, torch.device("cpu"), f"{key}.config")
    weights = WeightShards(out)
    for part in source.parts:
        with source.part(part):
            weights.add(revert_weight_conversion(source.model, source.tensors(part)))
    weights.close()
    save_configuration(source.model, out)


def byte_tokenizer(config: PretrainedConfig, key: str = "model") -> PreTrainedTokenizerBase:
    """A tokenizer of one token a byte.

    Raises:
        RecipeError: the vocabulary has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if config.vocab_size < len(alphabet) + 1:
        least = len(alphabet) + 1
        raise RecipeError(f"{key}.config.vocab_size", f"a random model has a token a byte; give at least {least}")
    end = "<|end|>"
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([end, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
