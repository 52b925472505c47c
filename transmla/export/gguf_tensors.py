"""The tensors of a DeepSeek checkpoint as llama.cpp has them, one at a time.

Names are llama.cpp's. `kv_b_proj` is split by heads into the two halves that its absorbed attention multiplies with.
The experts of a layer are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
ROUTER = "ffn_gate_inp"  # always float32: which experts are chosen hangs on it, and it is small
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>\w+)\.weight")
NUMBER = re.compile(r"\d+")
Take = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name there, its shape, how its numbers are stored, and how it is made.

    sources: the checkpoint's tensors. take: what of them.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    sources: tuple[str, ...]
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

    def entry(name: str, shape: tuple[int, ...], take: Take, *sources: str) -> Entry:
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, f"{name} has no name in the format"
        return Entry(found, shape, stored_kind(found, shape, kind), sources, take)

    heads, rank, nope, wide = (
        getattr(config, name) for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    )

    def keys(values: Sequence[Tensor]) -> Tensor:
        """`kv_b_proj` [H (nope + v), R] -> [H, R, nope], transposed for the absorbed product."""
        return values[0].unflatten(0, (heads, -1))[:, :nope].transpose(1, 2)

    def values(values: Sequence[Tensor]) -> Tensor:
        """`kv_b_proj` [H (nope + v), R] -> [H, v, R]."""
        return values[0].unflatten(0, (heads, -1))[:, nope:]

    def itself(values: Sequence[Tensor]) -> Tensor:
        return values[0]

    def stacked(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values))

    out = []
    for name in sorted(stored, key=_by_layer):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("kv_b_proj.weight"):
            out.append(entry(name.replace("kv_b_proj", "k_b_proj"), (heads, rank, nope), keys, name))
            out.append(entry(name.replace("kv_b_proj", "v_b_proj"), (heads, wide, rank), values, name))
        elif expert := EXPERT.fullmatch(name):
            if expert["number"] == "0":
                count, place = config.n_routed_experts, (expert["experts"], expert["matrix"])
                parts = [f"{place[0]}.{number}.{place[1]}.weight" for number in range(count)]
                shape = (count, *stored[name].shape)
                out.append(entry(f"{place[0]}.{place[1]}.weight", shape, stacked, *parts))
        else:
            out.append(entry(name, stored[name].shape, itself, name))
    return out


def stored_kind(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """How one tensor's numbers are stored in a file of a kind: vectors and routers are float32, as llama.cpp wants
    them; what a quantised format cannot hold is bfloat16."""
    if len(shape) == 1 or f".{ROUTER}." in name:
        return GGMLQuantizationType.F32
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):
        return kind
    held = not any(f".{part}." in name for part in KEPT) and shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
    return kind if held else GGMLQuantizationType.BF16


def numbers(folder: Path, key: str, wanted: list[Entry]) -> Iterator[np.ndarray]:
    """The content of each entry in turn; no more than what one is made of is in memory. key: for errors."""
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in weight_files(folder, key):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            where |= dict.fromkeys(opened.keys(), opened)
        for entry in wanted:
            value = entry.take([where[name].get_tensor(name) for name in entry.sources]).contiguous()
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
