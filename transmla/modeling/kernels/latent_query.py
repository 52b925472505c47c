"""Softmax attention of one query a row on the cached latent, in Triton: the cache is read once.

A first kernel goes through a part of a row's cache for up to 32 heads, with tokens as the rows of both products (on
Hopper a product has at least 64 rows, and there are fewer heads than that); a second one joins the parts, as in
Flash-Decoding (Dao and others, 2023).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, WARPS, STAGES = 64, 4, 2  # the fastest of those tried on an H100 (docs/speed.md)
MOST_HEADS = 32  # of one program: its sums, latent dimension x heads in float32, fill the registers
JOINED = 8192  # numbers that one program of the second kernel joins, at most


@triton.jit
def _part(
    QUERY,
    ROPE_QUERY,
    LATENT,
    ROPE_KEY,
    MASK,
    SUM,
    LOG,
    length,
    scaling,
    latent_row,
    latent_token,
    key_row,
    key_token,
    mask_row,
    mask_token,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.program_id(2) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    r, p = tl.arange(0, RANK_BLOCK), tl.arange(0, ROPE_BLOCK)
    first = row * HEADS + head
    query = tl.load(QUERY + first[None] * RANK + r[:, None], mask=(head[None] < HEADS) & (r[:, None] < RANK), other=0.0)
    rope_query = tl.load(
        ROPE_QUERY + first[None] * ROPE + p[:, None], mask=(head[None] < HEADS) & (p[:, None] < ROPE), other=0.0
    )
    share = tl.cdiv(tl.cdiv(length, PARTS), TOKENS) * TOKENS
    begin = part * share
    end = tl.minimum(begin + share, length)
    most = tl.full([HEAD_BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    summed = tl.zeros([RANK_BLOCK, HEAD_BLOCK], tl.float32)
    LATENT += row * latent_row
    ROPE_KEY += row * key_row
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < end
        at = token.to(tl.int64)[:, None]
        if RANK_BLOCK == RANK:
            latent = tl.load(LATENT + at * latent_token + r[None], mask=there[:, None], other=0.0)
        else:
            latent = tl.load(LATENT + at * latent_token + r[None], mask=there[:, None] & (r[None] < RANK), other=0.0)
        rope_key = tl.load(ROPE_KEY + at * key_token + p[None], mask=there[:, None] & (p[None] < ROPE), other=0.0)
        logits = tl.dot(rope_key, rope_query, tl.dot(latent, query)) * scaling
        if MASKED:
            hidden = tl.load(MASK + row * mask_row + token * mask_token, mask=there, other=0.0).to(tl.float32)
            logits += hidden[:, None]
        logits = tl.where(there[:, None], tl.maximum(logits * 1.4426950408889634, -1.0e30), -2.0e30)
        new = tl.maximum(most, tl.max(logits, 0))
        old, weight = tl.exp2(most - new), tl.exp2(logits - new[None])
        total = total * old + tl.sum(weight, 0)
        summed = tl.dot(tl.trans(latent), weight.to(latent.dtype), summed * old[None])
        most = new
    at = (row * PARTS + part) * HEADS + head
    there = head < HEADS
    tl.store(
        SUM + at[None] * RANK + r[:, None],
        (summed / tl.maximum(total, 1.0e-30)[None]).to(SUM.dtype.element_ty),
        mask=there[None] & (r[:, None] < RANK),
    )
    tl.store(LOG + at, tl.where(total > 0.0, most + tl.log2(total), -3.0e30), mask=there)


@triton.jit
def _join(SUM, LOG, OUT, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = tl.arange(0, PARTS)
    r = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = (row * PARTS + part) * HEADS + head
    log = tl.load(LOG + at)
    weight = tl.exp2(log - tl.max(log, 0))
    weight = weight / tl.sum(weight, 0)
    summed = tl.load(SUM + at[:, None] * RANK + r[None], mask=r[None] < RANK, other=0.0)
    tl.store(
        OUT + (row * HEADS + head) * RANK + r,
        tl.sum(summed * weight[:, None], 0).to(OUT.dtype.element_ty),
        mask=r < RANK,
    )


@cache
def _card(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have."""
    found: Any = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _tokens(rank: int, rope: int, memory: int) -> int:
    """How many tokens a program holds at a time, twice over; 0: not even 32 fit."""
    bytes_per_token = 2 * STAGES * (_block(rank) + _block(rope))
    room = memory - 2 * MOST_HEADS * (_block(rank) + _block(rope))
    return next((tokens for tokens in (TOKENS, TOKENS // 2) if tokens * bytes_per_token <= room), 0)


def fits(rank: int, rope: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes a latent and a rope key of these dimensions there."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or rank % 16 or rope % 16:
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 0) and _block(rank) <= 512 and _tokens(rank, rope, _card(device)[1]) > 0


def parts_of(rows: int, heads: int, length: int, processors: int) -> int:
    """Into how many parts a row's cache is cut: a power of two, so that one program falls to every multiprocessor and
    each still has two blocks of tokens."""
    programs = rows * triton.cdiv(heads, MOST_HEADS)
    most = max(1, min(processors // programs, triton.cdiv(length, 2 * TOKENS), 128))
    return 1 << (most.bit_length() - 1)


def latent_query(
    query: Tensor, rope_query: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Weighted sum of latents for one query a row (DeepSeek-V2, arXiv:2405.04434, 2.1.2, kv_b absorbed).

        softmax((query . c + rope_query . k) · scaling + mask) c

    Args:
        query, rope_query: [B, H, R] and [B, H, P], bfloat16 or float16 like the cache; R and P multiples of 16, R at
            most 512.
        latent, rope_key: [B, S, R] and [B, S, P], their last dimension contiguous.
        mask: additive, [B or 1, S], or None.

    Returns:
        [B, H, R].
    """
    rows, heads, rank = query.shape
    rope, length = rope_query.shape[-1], latent.shape[1]
    processors, memory = _card(query.device)
    head_block = min(MOST_HEADS, _block(heads))
    parts = parts_of(rows, heads, length, processors)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    summed = torch.empty(rows, parts, heads, rank, dtype=torch.float32, device=query.device) if parts > 1 else out
    logs = torch.empty(rows, parts, heads, dtype=torch.float32, device=query.device)
    part: Any = _part
    part[(rows, parts, triton.cdiv(heads, head_block))](
        query.contiguous(),
        rope_query.contiguous(),
        latent,
        rope_key,
        latent if mask is None else mask,
        summed,
        logs,
        length,
        scaling,
        latent.stride(0),
        latent.stride(1),
        rope_key.stride(0),
        rope_key.stride(1),
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        0 if mask is None else mask.stride(1),
        HEADS=heads,
        HEAD_BLOCK=head_block,
        RANK=rank,
        RANK_BLOCK=_block(rank),
        ROPE=rope,
        ROPE_BLOCK=_block(rope),
        TOKENS=_tokens(rank, rope, memory),
        PARTS=parts,
        MASKED=mask is not None,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    if parts == 1:
        return out
    join: Any = _join
    block = min(_block(rank), JOINED // parts)
    join[(rows, heads, triton.cdiv(rank, block))](
        summed, logs, out, HEADS=heads, RANK=rank, BLOCK=block, PARTS=parts, num_warps=4
    )
    return out
