"""Evaluate one model of a run: quality on every dataset, error by layer, continuations of prompts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.evaluate.perplexity import compare, final_hidden
from transmla.modeling.window import final_softcap
from transmla.recipe import Evaluate
from transmla.recover.transfer import attention_errors


def reference_file(folder: Path, dataset: str) -> Path:
    """Where the teacher's windows, hidden states and head for a dataset are kept."""
    return folder / f"{dataset.replace('/', '_')}.safetensors"


def evaluate_teacher(
    teacher: PreTrainedModel, windows: dict[str, Tensor], section: Evaluate, folder: Path
) -> dict[str, Any]:
    """Evaluate the teacher and keep, below `folder`, what the others are compared with.

    Args:
        windows: by dataset, [n, L].
    """
    head = teacher.get_output_embeddings().weight.detach()
    quality = {}
    for dataset, rows in windows.items():
        hidden = final_hidden(teacher, rows, section.batch_size, f"teacher on {dataset}")
        save_file({"windows": rows, "hidden": hidden, "head": head.cpu().clone()}, reference_file(folder, dataset))
        quality[dataset] = asdict(compare(rows, hidden, head, hidden, head, final_softcap(teacher.config)))
    return quality


def evaluate_student(
    model: PreTrainedModel, name: str, section: Evaluate, reference: Path
) -> dict[str, Any]:
    """Evaluate a model on the teacher's windows. reference: the folder that `evaluate_teacher` filled."""
    head = model.get_output_embeddings().weight.detach()
    quality = {}
    for dataset in section.data:
        saved = load_file(reference_file(reference, dataset))
        hidden = final_hidden(model, saved["windows"], section.batch_size, f"{name} on {dataset}")
        softcap = final_softcap(model.config)
        result = compare(saved["windows"], hidden, head, saved["hidden"], saved["head"].to(head.device), softcap)
        quality[dataset] = asdict(result)
    return quality


@torch.no_grad()
def layer_errors(
    teacher: PreTrainedModel, student: PreTrainedModel, window: Tensor, scales: list[float]
) -> list[float]:
    """Normalised output error of every attention, the mean over one window [1, L]."""
    errors = attention_errors(teacher, student, {"input_ids": window.to(teacher.device)}, scales)
    return (errors / window.numel()).tolist()


def continue_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Evaluate
) -> dict[str, str]:
    """Greedy continuations of the recipe's prompts."""
    texts = {}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for prompt in section.prompts:
        tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
        out = model.generate(
            **tokens,
            max_new_tokens=section.max_new_tokens,
            do_sample=False,
            repetition_penalty=section.repetition_penalty,
            pad_token_id=padding,
        )
        texts[prompt] = tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
