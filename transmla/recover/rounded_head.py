"""A trained float32 head as bfloat16, for the time of one loss, without a copy of it.

A float32 number is a bfloat16 and 16 bits more. Both halves of every row change places with one another until the
bfloat16 half is contiguous, products read it there, and the way back restores every bit. At 152,064 x 3,584 a copy
would be 1.0 GiB; this is two passes over the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 2**14  # a row is in one program's registers


@triton.jit
def _split(WHOLE, HALVES, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    there = lane < width
    bits = tl.load(WHOLE + row * width + lane, mask=there, other=0)
    # To the nearest, ties away from zero: to the even one, two numbers would have the same halves.
    high = (bits + 0x8000) >> 16
    no_number = (bits & 0x7FFFFFFF) > 0x7F800000  # what is added would carry into the exponent
    high = tl.where(no_number, (bits >> 16) | 0x40, high)
    low = bits - (high << 16)
    tl.debug_barrier()  # all of the row is read before any of it is written
    tl.store(HALVES + row * 2 * width + lane, high.to(tl.int16), mask=there)
    tl.store(HALVES + row * 2 * width + width + lane, low.to(tl.int16), mask=there)


@triton.jit
def _join(WHOLE, HALVES, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    there = lane < width
    high = tl.load(HALVES + row * 2 * width + lane, mask=there, other=0).to(tl.int32)
    low = tl.load(HALVES + row * 2 * width + width + lane, mask=there, other=0).to(tl.int32)
    tl.debug_barrier()
    tl.store(WHOLE + row * width + lane, (high << 16) + low, mask=there)


def can_be_rounded(head: Tensor) -> bool:
    """Whether `rounded_in_place` takes a head [V, D]."""
    return head.is_cuda and head.dtype == torch.float32 and head.is_contiguous() and head.shape[1] <= WIDEST


@contextmanager
def rounded_in_place(head: Tensor) -> Iterator[Tensor]:
    """A float32 head [V, D] as bfloat16 [V, D], in its own memory, which holds no float32 numbers meanwhile.

    Work that is queued behind on the same stream afterwards finds every number as it was, to the bit (a NaN as a NaN).
    Nothing on another stream may read the head meanwhile.
    """
    kernels: Any = (_split, _join)
    split, join = kernels
    rows, width = head.shape
    arguments = (head.view(torch.int32), head.view(torch.int16), width)
    block = triton.next_power_of_2(width)
    split[(rows,)](*arguments, BLOCK=block, num_warps=8)
    try:
        yield head.view(torch.bfloat16)[:, :width]
    finally:
        join[(rows,)](*arguments, BLOCK=block, num_warps=8)
