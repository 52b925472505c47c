"""What a checkpoint keeps of weights and optimizer: which tensors, their copy in host memory, and the way back."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

ALIGNMENT = 64  # bytes; a multiple of every dtype's width


class HostMemory:
    """Host memory for one snapshot at a time, kept for the next; page-locked where the tensors are on a GPU.

    It is one block, which the driver locks as it is: PyTorch's own pinned memory rounds every size up to a power of
    two.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def copies(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies of tensors, by file and name, complete when this returns and good until the next call.

        Copies from a GPU are queued behind one another and waited for once.

        Raises:
            MemoryError: there is not so much memory that can be locked.
        """
        values = [value for tensors in files.values() for value in tensors.values()]
        devices = {value.device for value in values if value.is_cuda}
        self._reserve(sum(map(_room, values)), locked=bool(devices))
        found: dict[str, dict[str, Tensor]] = {}
        start = 0
        for file, tensors in files.items():
            found[file] = {}
            for name, value in tensors.items():
                place = self._block[start : start + value.nbytes].view(value.dtype).view(value.shape)
                found[file][name] = place.copy_(value.detach(), non_blocking=True)
                start += _room(value)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return found

    def release(self) -> None:
        """Give the memory back. Copies that are still held stay as they are."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())
        self._block, self._locked = torch.empty(0, dtype=torch.uint8), False

    def _reserve(self, size: int, *, locked: bool) -> None:
        if len(self._block) >= size and self._locked >= locked:
            return
        self.release()
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that cannot
            memory.madvise(mmap.MADV_DONTFORK)  # locked pages would be copied for every worker of a data loader
        self._block = torch.frombuffer(memory, dtype=torch.uint8)
        if locked:
            if int(torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), size, 0)) != 0:
                raise MemoryError(f"{size / 2**30:.1f} GiB of the machine's memory cannot be locked for its copy")
            self._locked = True


def _room(value: Tensor) -> int:
    """Bytes of a tensor's copy, up to where the next may begin."""
    return -(-value.nbytes // ALIGNMENT) * ALIGNMENT


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that take a gradient, by name; tied ones once."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimizer's state dict by `NUMBER.NAME`, and the dict without them.

    Tensors of other layouts and of classes of their own (quantised moments) stay in the rest.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        plain = {name for name, value in values.items() if type(value) is Tensor and value.layout is torch.strided}
        tensors |= {f"{number}.{name}": value for name, value in values.items() if name in plain}
        rest[number] = {name: value for name, value in values.items() if name not in plain}
    return tensors, state | {"state": rest}


def join_optimizer(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The state dict that `split_optimizer` was given."""
    state = {number: dict(values) for number, values in rest["state"].items()}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state[int(number)][name] = value
    return rest | {"state": state}


def read_optimizer(file: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file that `split_optimizer` filled, none of them mapped from it.

    Scalars (AdamW's steps) stay on the CPU: PyTorch moves them where the optimizer counts on the device.
    """
    with safe_open(file, "pt") as content:
        values = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  # it is no dict
        return {name: value.to(device if value.ndim else "cpu", copy=True) for name, value in values.items()}


@torch.no_grad()
def read_weights(file: Path, model: nn.Module) -> None:
    """Fill the trained weights of a model from a file that has exactly these.

    Raises:
        ValueError: a name is missing or too many, a shape or a dtype differs; nothing was changed.
    """
    wanted = trained_weights(model)
    with safe_open(file, "pt") as content:
        there = set(content.keys())
        if there != set(wanted):
            name = min(there ^ set(wanted))
            raise ValueError(f"it has {name}, which is not trained" if name in there else f"it lacks {name}")
        found = {name: content.get_tensor(name) for name in wanted}
        for name, value in found.items():
            if (value.shape, value.dtype) != (wanted[name].shape, wanted[name].dtype):
                raise ValueError(f"{name} is {_kind(value)} instead of {_kind(wanted[name])}")
        for name, value in found.items():
            wanted[name].copy_(value)


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
