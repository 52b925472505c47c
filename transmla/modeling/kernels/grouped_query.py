"""Softmax attention of one query a row on cached keys and values of groups of heads (GQA), in Triton.

One program has a row and a group: it pays where these fill the card, as in writing texts by the thousand. Columns that
a mask hides from a row altogether, as what of a buffer is not written yet, are not read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, WARPS, STAGES = 32, 1, 3  # the fastest of those tried on an H100 (docs/experiments.md)
LEAST = 2  # programs to a multiprocessor; with fewer, a long cache would have to be cut into parts
WIDEST = 256


@triton.jit
def _attend(
    QUERY,
    KEY,
    VALUE,
    MASK,
    OUT,
    length,
    scaling,
    key_row,
    key_group,
    key_column,
    value_row,
    value_group,
    value_column,
    mask_row,
    mask_column,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.arange(0, HEAD_BLOCK)
    e, v = tl.arange(0, WIDTH_BLOCK), tl.arange(0, VALUE_BLOCK)
    first = (row * GROUPS + group) * HEADS + head
    query = tl.load(
        QUERY + first[:, None] * WIDTH + e[None], mask=(head[:, None] < HEADS) & (e[None] < WIDTH), other=0.0
    )
    most = tl.full([HEAD_BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    summed = tl.zeros([HEAD_BLOCK, VALUE_BLOCK], tl.float32)
    KEY += row * key_row + group * key_group
    VALUE += row * value_row + group * value_group
    for start in range(0, length, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < length
        hidden = tl.zeros([COLUMNS], tl.float32)
        if MASKED:
            hidden = tl.load(MASK + row * mask_row + column * mask_column, mask=there, other=-float("inf"))
            hidden = hidden.to(tl.float32)
            there = there & (hidden > -float("inf"))
        at = column.to(tl.int64)
        key = tl.load(KEY + at[None] * key_column + e[:, None], mask=there[None] & (e[:, None] < WIDTH), other=0.0)
        value = tl.load(
            VALUE + at[:, None] * value_column + v[None], mask=there[:, None] & (v[None] < VALUE_WIDTH), other=0.0
        )
        logits = tl.dot(query, key) * scaling + tl.where(there, hidden, 0.0)[None]
        logits = tl.where(there[None], tl.maximum(logits * 1.4426950408889634, -1.0e30), -2.0e30)
        new = tl.maximum(most, tl.max(logits, 1))
        old, weight = tl.exp2(most - new), tl.exp2(logits - new[:, None])
        total = total * old + tl.sum(weight, 1)
        summed = tl.dot(weight.to(value.dtype), value, summed * old[:, None])
        most = new
    tl.store(
        OUT + first[:, None] * VALUE_WIDTH + v[None],
        (summed / tl.maximum(total, 1.0e-30)[:, None]).to(OUT.dtype.element_ty),
        mask=(head[:, None] < HEADS) & (v[None] < VALUE_WIDTH),
    )


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def fits(rows: int, groups: int, width: int, value_width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes a cache [rows, groups, S, width] there, and pays."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or max(width, value_width) > WIDEST:
        return False
    found: Any = torch.cuda.get_device_properties(device)
    return (found.major, found.minor) >= (8, 0) and rows * groups >= LEAST * found.multi_processor_count


def grouped_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(query · key · scaling + mask) value for one query a row.

    Args:
        query: [B, H, E], H divisible by G, bfloat16 or float16 like the cache.
        key, value: [B, G, S, E] and [B, G, S, V], their last dimension contiguous; E and V at most 256.
        mask: additive, [B or 1, S], or None. A row that may see nothing has zeros.

    Returns:
        [B, H, V].
    """
    rows, heads, width = query.shape
    groups, length, value_width = value.shape[1:]
    out = query.new_empty(rows, heads, value_width)
    kernel: Any = _attend
    kernel[(rows, groups)](
        query.contiguous(),
        key,
        value,
        key if mask is None else mask,
        out,
        length,
        scaling,
        *key.stride()[:3],
        *value.stride()[:3],
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        0 if mask is None else mask.stride(1),
        GROUPS=groups,
        HEADS=heads // groups,
        HEAD_BLOCK=_block(heads // groups),
        WIDTH=width,
        WIDTH_BLOCK=_block(width),
        VALUE_WIDTH=value_width,
        VALUE_BLOCK=_block(value_width),
        COLUMNS=COLUMNS,
        MASKED=mask is not None,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out
