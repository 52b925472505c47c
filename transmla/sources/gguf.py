"""A GGUF file as an ordinary model directory: weights dequantised, tokenizer repaired."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource

SPLIT_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def check_digest(file: Path, expected: str | None) -> None:
    if expected is None:
        return
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise RecipeError(
            "model.sha256", f"the file has {found}, the recipe pins {expected}; do not use it, or pin the new digest"
        )


def dequantise(gguf: Path, section: ModelSource, out: Path) -> None:
    """Write a GGUF as an ordinary bfloat16 directory."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights, config = loaded.state_dict(), loaded.config
    if "quantization_config" in config.__dict__:
        del config.quantization_config  # a model that has it refuses to be saved
    if section.tie_word_embeddings:  # such a GGUF may hold a second, better quantised copy of the embedding as its head
        weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
        config.tie_word_embeddings = True
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.1e}")  # float32 rounding in the header
    config.dtype = torch.bfloat16
    model = type(loaded)(config).to(torch.bfloat16)  # type: ignore[arg-type]  # transformers' `to` is typed without its self
    missing, unexpected = model.load_state_dict(
        {name: value.to(torch.bfloat16) for name, value in weights.items()}, strict=False
    )
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if unexpected or set(missing) - tied:
        raise ValueError(f"the GGUF does not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _edit_json(out / "config.json", lambda content: content.pop("_model_name_or_path", None))
    edits = section.tokenizer
    if edits.split_digits:
        _edit_json(out / "tokenizer.json", lambda content: content.update(pre_tokenizer=SPLIT_DIGITS))
    changes: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} if edits.split_digits else {}
    if edits.model_max_length is not None:
        changes["model_max_length"] = edits.model_max_length
    _edit_json(out / "tokenizer_config.json", lambda content: content.update(changes))


def _edit_json(file: Path, change: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
