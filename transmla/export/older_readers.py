"""Files of a checkpoint that transformers 4, and engines that read its fields, understand as transformers 5 does.

transformers 5 writes the rotary embedding as `rope_parameters` alone and names tokenizer classes that version 4 lacks.
An older reader then takes a rotary base of 10,000 without a word, and finds no tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from transmla.files import save_whole

# Class attributes that a tokenizer class may set without behaving differently: each is written into the files.
STORED = {"model", "model_input_names", "padding_side", "vocab_files_names", "slow_tokenizer_class"}

# Where the files were, not what they say; version 5 finds out for itself.
LOCATION = ("is_local", "local_files_only", "backend")


def old_rope_fields(parameters: dict[str, Any]) -> dict[str, Any]:
    """The fields of transformers 4 that say what `rope_parameters` says.

    Returns:
        `rope_theta`; `rope_scaling`, None without scaling, else with its kind as `rope_type` and as the older `type`;
        for rotary embeddings by layer type, as Gemma 3 has them, `rope_local_base_freq` of the windowed layers.
    """
    if "full_attention" in parameters:
        local = {"rope_local_base_freq": parameters["sliding_attention"]["rope_theta"]}
        return old_rope_fields(parameters["full_attention"]) | local
    kind = parameters["rope_type"]
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if kind == "default" else scaling | {"type": kind},
    }


def add_old_fields(folder: Path) -> None:
    """Add to a saved config.json what transformers 4 reads the rotary embedding from."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= old_rope_fields(config["rope_parameters"])
    save_whole(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer such that transformers 4 and 5 give the same tokens, templates and special tokens.

    Both know `PreTrainedTokenizerFast`, which reads tokenizer.json as it stands. It takes the place of every class that
    does nothing else; a class with behaviour of its own (CodeLlama's infilling) keeps its name.
    """
    tokenizer.save_pretrained(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    for name in LOCATION:
        fields.pop(name, None)
    if not _behaviour(type(tokenizer)):
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Version 4 ends in a traceback at a list of this name, and does not know the names of a model's own special tokens.
    listed = isinstance(fields.get("extra_special_tokens"), list)
    named = set(tokenizer.special_tokens_map) - set(type(tokenizer).SPECIAL_TOKENS_ATTRIBUTES)
    special = [*(fields.pop("extra_special_tokens") if listed else ()), *(fields[name] for name in sorted(named))]
    if special:
        fields["additional_special_tokens"] = special
    # Version 4 has other defaults for these: a class's own, or none.
    fields["add_prefix_space"] = _adds_prefix_space(tokenizer)
    fields["clean_up_tokenization_spaces"] = _cleans_up(tokenizer)
    fields["model_input_names"] = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    fields["padding_side"], fields["truncation_side"] = tokenizer.padding_side, tokenizer.truncation_side
    save_whole(file, json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _behaviour(kind: type) -> set[str]:
    """What a tokenizer class does beyond the general one: names that it or its parents define."""
    parents = kind.__mro__[: kind.__mro__.index(PreTrainedTokenizerFast)]
    defined = {name for parent in parents for name in vars(parent)}
    return {name for name in defined if not name.startswith("__") or name == "__call__"} - STORED


def _adds_prefix_space(tokenizer: PreTrainedTokenizerFast) -> bool:
    """What tokenizer.json says. Version 4 would rewrite its first pre-tokenizer to what the configuration says."""
    first = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    return bool(first.get("add_prefix_space", tokenizer.add_prefix_space))


def _cleans_up(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether decoding takes spaces before punctuation away. Version 5 does not for byte pairs, unless told twice."""
    wanted = tokenizer.clean_up_tokenization_spaces
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return bool(wanted and (forced or type(tokenizer.backend_tokenizer.model).__name__ != "BPE"))
