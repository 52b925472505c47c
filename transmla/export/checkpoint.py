"""Write an exported model: sharded safetensors, configuration, generation configuration, tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DeepseekV3ForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from transmla.export.deepseek_config import deepseek_config
from transmla.export.deepseek_weights import export_state
from transmla.export.older_readers import add_old_fields, save_tokenizer
from transmla.recipe.schema import Export


def save_deepseek(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Export, dtype: torch.dtype, folder: Path
) -> None:
    """Sharded safetensors, configuration, generation configuration, tokenizer and chat template."""
    config = deepseek_config(student.config, section.layout, dtype)
    state = export_state(student, section.layout, dtype)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    model.load_state_dict(state, assign=True, strict=True)
    model.generation_config = GenerationConfig.from_dict(student.generation_config.to_dict())
    model.save_pretrained(folder, max_shard_size=section.max_shard_size)
    add_old_fields(folder)
    save_tokenizer(tokenizer, folder)


def save_own_class(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Export, dtype: torch.dtype, folder: Path
) -> None:
    """The student's own class: sharded safetensors, configuration, tokenizer. `import transmla` loads it."""
    student.to(dtype)  # type: ignore[arg-type]  # transformers' `to` is typed without its self
    student.save_pretrained(folder, max_shard_size=section.max_shard_size)
    add_old_fields(folder)
    save_tokenizer(tokenizer, folder)
