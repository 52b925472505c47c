"""Milliseconds of something on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM, REPEATED = 3, 12


def milliseconds(work: Callable[[], object], *, times: int = 1) -> float:
    """Median over repetitions; `times` in a row, so that the CPU is ahead of the device, for the share of one."""
    for _ in range(WARM):
        work()
    return _median(lambda: [work() for _ in range(times)]) / times


def graph_milliseconds(work: Callable[[], object]) -> float:
    """The same, replayed from a CUDA graph: what decoding does."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(WARM):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return _median(graph.replay)


def once(work: Callable[[], object]) -> float:
    """Of one call by itself."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _median(work: Callable[[], object]) -> float:
    return statistics.median(once(work) for _ in range(REPEATED))
