"""Reproducible arithmetic: the same recipe gives the same bits on the same device (`deterministic: true`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._inductor.config

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS adds in one order (its manual, "Results Reproducibility")


def workspace_conflict() -> str | None:
    """The workspaces of cuBLAS that the user's environment names, where its products would differ with them."""
    found = os.environ.get(WORKSPACE)
    return None if found in (None, *WORKSPACES) else found


def use_deterministic(wanted: bool) -> None:
    """Switch reproducible arithmetic of this process on or off; on, before anything is computed on a GPU.

    On, PyTorch takes kernels that add in one order, or raises where it has none, and its compiler chooses nothing by
    time. cuBLAS and NCCL read their settings from the environment when they start; what the user set there stays.
    """
    if wanted:
        os.environ.setdefault(WORKSPACE, WORKSPACES[0])
        os.environ.setdefault("NCCL_ALGO", "Ring")  # of a tree, or of the switch, the order of adding is not ours
    elif not torch.are_deterministic_algorithms_enabled():
        return
    torch.use_deterministic_algorithms(wanted)
    if hasattr(torch._inductor.config, "deterministic"):  # of 2.11 on; later versions set it themselves
        torch._inductor.config.deterministic = wanted
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # type: ignore[attr-defined]  # costs a pass each
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = False


def is_deterministic() -> bool:
    """Whether reproducible arithmetic is on."""
    return torch.are_deterministic_algorithms_enabled()


@contextmanager
def written_once() -> Iterator[None]:
    """PyTorch's ordinary kernels, for writes to different places, which are the same in any order.

    Its reproducible ones sort the places first, in every step of a decoder again.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch._C._set_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before)
