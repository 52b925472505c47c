"""What a safetensors file says it holds, and whether it can hold it: read from its first bytes and its size."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Number formats that a model computes with: PyTorch's name and bytes. All others are quantised, or no weights.
FLOATS = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
MOST_BYTES = 100_000_000  # of a header; the library reads no longer one
POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: `dtype` is the name that the format gives it."""

    dtype: str
    shape: tuple[int, ...]


class DamagedFileError(Exception):
    """A file that is not what its name says; the message names it."""


def require_content(file: Path) -> None:
    """Check that a file is there and is no pointer of Git LFS that stands for it.

    Raises:
        DamagedFileError: it is not, or is one.
    """
    try:
        with file.open("rb") as content:
            start = content.read(len(POINTER))
    except FileNotFoundError:
        raise DamagedFileError(f"{file} is not there") from None
    except OSError as error:  # a folder, or somebody else's
        raise DamagedFileError(f"{file} cannot be read: {error.strerror}") from None
    if start == POINTER:
        raise DamagedFileError(f"{file} is a pointer of Git LFS, not the file itself (git lfs pull fetches it)")


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name; no weight is read.

    Raises:
        DamagedFileError: the file is not there, is cut off, or its header is no header.
    """
    require_content(file)
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MOST_BYTES):
            raise DamagedFileError(f"{file} ({size:,} bytes) is no whole safetensors file: its header is cut off")
        try:
            header = json.loads(content.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(value) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedFileError(f"{file} is no safetensors file: it does not begin with a header") from None
    end = 0
    for name, (stored, begin, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        width = FLOATS[stored.dtype][1] if stored.dtype in FLOATS else None
        if begin != end or (width is not None and stop - begin != width * math.prod(stored.shape)):
            raise DamagedFileError(f"{file} is damaged: the place of {name} in it does not fit its shape")
        end = stop
    if 8 + length + end != size:
        raise DamagedFileError(f"{file} has {size:,} bytes where its header describes {8 + length + end:,}")
    return {name: stored for name, (stored, _, _) in entries.items()}


def _entry(value: Any) -> tuple[Stored, int, int]:
    begin, stop = value["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (begin, stop, *value["shape"])):
        raise ValueError("places and dimensions are counts")
    return Stored(str(value["dtype"]), tuple(value["shape"])), begin, stop
