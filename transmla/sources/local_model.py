"""Load a causal language model from a directory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from transmla.families import default_kernel


def load_model(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load a causal language model in eval mode, with its family's attention kernel."""
    config = AutoConfig.from_pretrained(folder)
    kernel = default_kernel(config.model_type)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=kernel)
    return model.to(device).eval()  # type: ignore[arg-type]  # transformers' `to` is typed without its self
