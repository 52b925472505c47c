"""A teacher's final hidden states, kept by row, so that it reads every row of the data once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transmla.errors import RecipeError
from transmla.hardware import free_memory


class TeacherStates:
    """Final hidden states of packed rows of one length, on the device: [rows, T, D] in the teacher's dtype.

    The states are what the loss reads, so that a pass over kept rows is the same as one with the teacher. A batch with
    a row that was not seen yet is computed whole.

    Args:
        rows: of the packed dataset. length: T. width: D.
        reserve: bytes of the device that training needs besides.
        key: recipe key, for errors.

    Raises:
        RecipeError: the device has no room for them.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        reserve: int = 0,
        key: str = "recover.N.keep_teacher",
    ) -> None:
        needed, free = rows * length * width * dtype.itemsize, free_memory(device)
        if needed + reserve > free:
            raise RecipeError(
                key,
                f"{rows:,} rows of {length:,} tokens are {needed / 2**30:.1f} GiB of the teacher's states beside "
                f"{reserve / 2**30:.1f} "
                f"GiB of training, {free / 2**30:.1f} are free on the device; leave it out, or train on less text",
            )
        self.states = torch.empty(rows, length, width, dtype=dtype, device=device)
        self.seen = [False] * rows

    def __call__(self, rows: Sequence[int], compute: Callable[[], Tensor]) -> Tensor:
        """The states of a batch's rows [B, T, D]; compute: gives them where they are not kept."""
        place = torch.tensor(rows, device="cpu", pin_memory=self.states.is_cuda).to(
            self.states.device, non_blocking=True
        )
        if all(self.seen[row] for row in rows):
            return self.states[place]
        found = compute()
        self.states[place] = found.to(self.states.dtype)
        for row in rows:
            self.seen[row] = True
        return found
