"""Hidden states of many windows, outside the memory of the process where they are large."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

SHARE = 16  # states may take one part in so many of a GPU's free memory


def batches_of(windows: Tensor, batch_size: int) -> list[slice]:
    """The batches of windows, or of their states [n, L, ...]."""
    return [slice(start, min(start + batch_size, len(windows))) for start in range(0, len(windows), batch_size)]


class StateStream:
    """Hidden states of windows, [n, L, D]: on a GPU where they take a small share of what is free there, else in a
    file, so that memory does not grow with the number of tokens.

    The file has no name, so that nothing is left of it when the process ends, however it ends.
    """

    def __init__(self, states: tuple[int, int, int], dtype: torch.dtype, *, device: torch.device | None = None) -> None:
        """device: a GPU on which they may lie."""
        count = states[0] * states[1] * states[2]
        on_gpu = device is not None and device.type == "cuda"
        if on_gpu and SHARE * count * dtype.itemsize <= torch.cuda.mem_get_info(device)[0]:
            self.states = torch.empty(states, dtype=dtype, device=device)
            return
        with tempfile.TemporaryFile() as room:
            os.posix_fallocate(room.fileno(), 0, count * dtype.itemsize)  # with holes it would fail on a full disk late
            name = f"/proc/self/fd/{room.fileno()}"
            self.states = torch.from_file(name, shared=True, size=count, dtype=dtype).view(states)

    def get(self, rows: slice, device: torch.device) -> Tensor:
        """A copy of some windows' states; what is read may be written over before it is used."""
        return self.states[rows].to(device, copy=True)

    def put(self, rows: slice, states: Tensor) -> None:
        """Replace the states of some windows."""
        self.states[rows] = states.to(self.states.device, self.states.dtype)
