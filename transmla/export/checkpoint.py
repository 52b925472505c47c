"""Write an exported model: sharded safetensors, configuration, generation configuration, tokenizer.

A student may be whole in memory, or read part by part: then no more than a part and a file are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from transmla.export.deepseek_config import deepseek_config
from transmla.export.deepseek_names import name_map, template
from transmla.export.deepseek_weights import export_tensors
from transmla.export.older_readers import add_old_fields, save_tokenizer
from transmla.hardware import trim_memory
from transmla.recipe.schema import Export
from transmla.sources.layered_model import LayeredModel, save_configuration
from transmla.sources.weight_shards import WeightShards, bytes_of

Student = PreTrainedModel | LayeredModel

TRIMMED = 2**28  # bytes of weights after which memory is trimmed: with all that is imported that takes 0.2 s


def save_deepseek(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    section: Export,
    dtype: torch.dtype,
    folder: Path,
    *,
    shifts: Tensor | None = None,
) -> None:
    """Sharded safetensors, configuration, generation configuration, tokenizer and chat template.

    Args:
        shifts: of the routers' logits, as a conversion keeps them beside its student; for experts alone.
    """
    source = _model(student)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(deepseek_config(source.config, section.layout, dtype))
    model.to(dtype)  # type: ignore[arg-type]  # transformers' `to` is typed without its self
    filled = name_map(source.config).filled
    wanted = {name: value.shape for name, value in model.state_dict().items() if template(name)[0] not in filled}
    weights = WeightShards(folder, bytes_of(section.max_shard_size))
    for part in _parts(student):
        tensors = export_tensors(part, source.config, section.layout, dtype, shifts=shifts)
        for name, value in tensors.items():
            assert wanted.pop(name, None) == value.shape, f"{name} is no tensor of the format, or of another shape"
        weights.add(revert_weight_conversion(model, tensors))  # one matrix per expert, as DeepSeek's files have them
    assert not wanted, f"nothing was exported for {sorted(wanted)}"
    weights.close()
    model.generation_config = GenerationConfig.from_dict(source.generation_config.to_dict())
    save_configuration(model, folder)
    add_old_fields(folder)
    save_tokenizer(tokenizer, folder)


def save_own_class(
    student: Student, tokenizer: PreTrainedTokenizerBase, section: Export, dtype: torch.dtype, folder: Path
) -> None:
    """The student's own class: sharded safetensors, configuration, tokenizer. `import transmla` loads it."""
    model = _model(student)
    weights = WeightShards(folder, bytes_of(section.max_shard_size))
    for part in _parts(student):
        if model.config.tie_word_embeddings:
            part.pop("lm_head.weight", None)
        weights.add({name: value.to(dtype) for name, value in part.items()})
    weights.close()
    model.to(dtype)  # type: ignore[arg-type]  # transformers' `to` is typed without its self
    save_configuration(model, folder)
    add_old_fields(folder)
    save_tokenizer(tokenizer, folder)


def _model(student: Student) -> PreTrainedModel:
    return student.model if isinstance(student, LayeredModel) else student


def _parts(student: Student) -> Iterator[dict[str, Tensor]]:
    """All tensors of a student, a part at a time; a tied head beside its embedding."""
    if not isinstance(student, LayeredModel):
        yield student.state_dict() | {"lm_head.weight": student.get_output_embeddings().weight}
        return
    gone = 0
    for index, name in enumerate(student.parts):
        with student.part(name):
            tensors = student.tensors(name)
            gone += sum(value.nbytes for value in tensors.values())
            if index == 0 and student.tied:
                tensors["lm_head.weight"] = next(iter(tensors.values()))
            yield tensors
        if gone >= TRIMMED:
            trim_memory()
            gone = 0
