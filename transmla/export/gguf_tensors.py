"""The tensors of a DeepSeek checkpoint as llama.cpp has them, one at a time.

Names are llama.cpp's, `kv_b_proj` is split by heads into the two halves that its absorbed attention multiplies with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import quantize
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from transmla.sources.safetensors_header import Stored
from transmla.sources.weight_files import weight_files

# Rows that write a latent are scaled by 2^-30 in an exported model: float16, and the float16 scales of every quantised
# format, would make zeros of them.
KEPT = ("attn_kv_a_mqa", "attn_q_a")
NUMBER = re.compile(r"\d+")
Take = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name there, its shape, how its numbers are stored, and how it is made.

    source: the checkpoint's tensor. take: what of it.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    source: str
    take: Take

    @property
    def bytes(self) -> int:
        """Size in the file."""
        block, width = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * width


def entries(config: PretrainedConfig, stored: Mapping[str, Stored], kind: GGMLQuantizationType) -> list[Entry]:
    """All tensors of the file, in the order of the layers.

    Args:
        stored: the checkpoint's tensors by name. kind: of matrices, where nothing speaks against it.
    """
    names = get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)

    def entry(name: str, shape: tuple[int, ...], source: str, take: Take) -> Entry:
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, f"{name} has no name in the format"
        return Entry(found, shape, stored_kind(found, shape, kind), source, take)

    heads, rank, nope, wide = (
        getattr(config, name) for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    )

    def keys(value: Tensor) -> Tensor:
        """`kv_b_proj` [H (nope + v), R] -> [H, R, nope], transposed for the absorbed product."""
        return value.unflatten(0, (heads, -1))[:, :nope].transpose(1, 2)

    def values(value: Tensor) -> Tensor:
        """`kv_b_proj` [H (nope + v), R] -> [H, v, R]."""
        return value.unflatten(0, (heads, -1))[:, nope:]

    out = []
    for name in sorted(stored, key=_by_layer):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("kv_b_proj.weight"):
            out.append(entry(name.replace("kv_b_proj", "k_b_proj"), (heads, rank, nope), name, keys))
            out.append(entry(name.replace("kv_b_proj", "v_b_proj"), (heads, wide, rank), name, values))
        else:
            out.append(entry(name, stored[name].shape, name, lambda value: value))
    return out


def stored_kind(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """How one tensor's numbers are stored in a file of a kind: vectors are float32, as llama.cpp wants them; what a
    quantised format cannot hold is bfloat16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):
        return kind
    held = not any(f".{part}." in name for part in KEPT) and shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
    return kind if held else GGMLQuantizationType.BF16


def numbers(folder: Path, key: str, wanted: list[Entry]) -> Iterator[np.ndarray]:
    """The content of each entry in turn; no more than one tensor is in memory. key: for errors."""
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in weight_files(folder, key):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            where |= dict.fromkeys(opened.keys(), opened)
        for entry in wanted:
            value = entry.take(where[entry.source].get_tensor(entry.source)).contiguous()
            assert tuple(value.shape) == entry.shape, f"{entry.name} has another shape than was written down"
            yield _numbers(value, entry.kind)


def _numbers(value: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    if kind == GGMLQuantizationType.BF16:
        return value.to(torch.bfloat16).view(torch.int16).numpy()
    return quantize(value.float().numpy(), kind)


def _by_layer(name: str) -> tuple[int, str]:
    """The embedding, the layers by number, the last norm and the head."""
    number = NUMBER.search(name)
    first = 0 if "embed_tokens" in name else 10**9
    return (int(number[0]) + 1 if number else first), name
