"""Greedy continuations of prompts, for a reader to judge."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.recipe.evaluation import Evaluate


def continue_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Evaluate) -> dict[str, str]:
    """Greedy continuations of the recipe's prompts."""
    texts: dict[str, str] = {}
    generate: Any = model.generate  # of every causal language model, which PreTrainedModel's type does not say
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for prompt in section.prompts:
        tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
        out = generate(
            **tokens,
            max_new_tokens=section.max_new_tokens,
            do_sample=False,
            repetition_penalty=section.repetition_penalty,
            pad_token_id=padding,
        )
        texts[prompt] = str(tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts
