"""Kernels at a recipe's shape, beside what they replace and what they cannot be faster than."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from transmla.bench.divergence_times import divergence_rows
from transmla.bench.timing import graph_milliseconds, milliseconds
from transmla.families.family import key_value_heads
from transmla.geometry import MLAGeometry
from transmla.modeling.kernels.fused import sdpa
from transmla.modeling.kernels.one_query import one_latent_query, one_query
from transmla.modeling.kernels.packed import packed_attention, plan_of

DECODED = ((32, 8192), (8, 32768), (1, 32768))  # rows and cached tokens
PACKED = ((4096, 4, True), (8192, 4, True), (8192, 16, False), (8192, 1, True))  # tokens, documents, whether all alike

Row = dict[str, Any]


def kernel_rows(config: PretrainedConfig, geometry: MLAGeometry, dtype: torch.dtype) -> Iterator[Row]:
    """One row a kernel and shape: name, shape, milliseconds, and those of other ways to compute the same."""
    for rows, length in DECODED:
        yield _one_query(config, geometry, dtype, rows, length)
    for tokens, documents, alike in PACKED:
        yield _packed(config, geometry, dtype, tokens, documents, alike=alike)
    yield from divergence_rows(config, dtype)


@torch.no_grad()
def _one_query(config: PretrainedConfig, geometry: MLAGeometry, dtype: torch.dtype, rows: int, length: int) -> Row:
    heads, groups = config.num_attention_heads, key_value_heads(config)
    rank, rope = geometry.kv_lora_rank, geometry.qk_rope_head_dim
    wide = getattr(config, "head_dim", None) or config.hidden_size // heads
    query, rope_query = _drawn(dtype, rows, heads, 1, rank), _drawn(dtype, rows, heads, 1, rope)
    latent, rope_key = _drawn(dtype, rows, 1, length, rank), _drawn(dtype, rows, 1, length, rope)
    own_query, key, value = (
        _drawn(dtype, rows, h, n, wide) for h, n in ((heads, 1), (groups, length), (groups, length))
    )
    scaling = wide**-0.5
    kernel = graph_milliseconds(lambda: one_latent_query(query, rope_query, latent, rope_key, None, scaling))
    parts = [(query, latent), (rope_query, rope_key)]
    size = rows * length * (rank + rope) * latent.element_size()
    return {
        "kernel": "one query on the latent",
        "shape": f"{rows} x {length:,}",
        "ms": kernel,
        "TB/s": size / kernel / 1e9,
        "others": {
            "two products": graph_milliseconds(lambda: one_query(parts, latent, None, scaling)),
            "source": graph_milliseconds(
                lambda: F.scaled_dot_product_attention(own_query, key, value, enable_gqa=groups < heads)
            ),
        },
    }


def _starts(tokens: int, documents: int, alike: bool) -> Tensor:
    """Where documents begin, [documents]: evenly, or anywhere."""
    if alike:
        return torch.arange(documents) * (tokens // documents)
    places = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(3))[: documents - 1] + 1
    return torch.cat([torch.zeros(1, dtype=torch.long), places.sort().values])


def _packed(
    config: PretrainedConfig, geometry: MLAGeometry, dtype: torch.dtype, tokens: int, documents: int, *, alike: bool
) -> Row:
    heads, wide = config.num_attention_heads, geometry.qk_nope_head_dim + geometry.qk_rope_head_dim
    query, key, value = (
        _drawn(dtype, 1, tokens, heads, width).transpose(1, 2).requires_grad_()
        for width in (wide, wide, geometry.v_head_dim)
    )
    length = tokens // documents
    bounds = torch.cat([_starts(tokens, documents, alike), torch.tensor([tokens])]).to(torch.int32)
    plan, on_device = torch.tensor(plan_of(bounds)), bounds.cuda()
    grad = _drawn(dtype, 1, tokens, heads, geometry.v_head_dim)
    document = torch.bucketize(torch.arange(tokens, device="cuda"), on_device[1:].long(), right=True)
    mask = (document[:, None] == document[None]) & torch.ones_like(document[:, None] >= document[None]).tril()

    def kernel() -> Tensor:
        return packed_attention(
            nn.Identity(), query, key, value, None, scaling=wide**-0.5, document_bounds=on_device, document_plan=plan
        )[0]

    def masked() -> Tensor:
        return sdpa(query, key, value, mask[None, None], wide**-0.5, 0.0)

    def batch() -> Tensor:
        q, k, v = (x[0].unflatten(1, (documents, length)).transpose(0, 1) for x in (query, key, value))
        return sdpa(q, k, v, None, wide**-0.5, 0.0).flatten(0, 1)[None]

    def both(forward: Any) -> float:
        def work() -> None:
            forward().backward(grad)
            for states in (query, key, value):
                states.grad = None

        return milliseconds(work, times=10)

    return {
        "kernel": "packed attention, forward and backward",
        "shape": f"{tokens:,} in {documents}{'' if alike else ' uneven'}",
        "ms": both(kernel),
        "others": {"mask": both(masked)} | ({"a batch of documents": both(batch)} if alike else {}),
    }


def _drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)
