"""The source's generation configuration, in a form that every later save accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from transmla.errors import RecipeError

NAME = "generation_config.json"
# Values that mean something only while text is sampled, each with the value that means nothing.
SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_p": None,
    "top_h": None,
}
# Values that mean nothing where a single sequence is written, or where words alone are asked for.
BEAMS = ("early_stopping", "length_penalty", "num_return_sequences", "num_beam_groups", "diversity_penalty")
OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
CACHE = ("cache_implementation", "cache_config")


def read_generation(folder: Path, config: PretrainedConfig, key: str) -> GenerationConfig:
    """A source's generation configuration; what it leaves out comes from the model's configuration. key: for errors.

    transformers refuses to save some of what it reads, in the middle of training. Sampling values without `do_sample`
    (Vicuna, the first Llama 2 chat) are kept and `do_sample` is set, for that is what their authors meant. Values that
    have no effect beside the others are left out.

    Raises:
        RecipeError: the file is broken, or holds what no reader accepts.
    """
    file = folder / NAME
    if not file.is_file():
        return GenerationConfig.from_model_config(config)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        generation = GenerationConfig.from_dict(_normalised(content))
        generation.validate(strict=True)
    except Exception as error:  # transformers compares values without asking for their type
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(key, f"{file} cannot be used: {reason}; correct it, or delete it") from None
    return generation


def _normalised(content: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in content.items() if value is not None}
    if "do_sample" not in found and any(found.get(name, nothing) != nothing for name, nothing in SAMPLING.items()):
        found["do_sample"] = found.get("temperature", 1.0) > 0  # a temperature of 0 means: do not sample
    idle: tuple[str, ...] = ()
    if not found.get("do_sample"):
        idle += tuple(SAMPLING)
    if found.get("num_beams", 1) == 1:
        idle += BEAMS if not found.get("do_sample") else BEAMS[:2]
    if found.get("return_dict_in_generate") is not True:
        idle += OUTPUTS
    if found.get("use_cache") is False:
        idle += CACHE
    if found.get("pad_token_id", 0) < 0:
        idle += ("pad_token_id",)
    return {name: value for name, value in found.items() if name not in idle}
