"""The safetensors files of a transformers checkpoint, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from transmla.sources.weight_files import INDEX, SINGLE

SHARD = 4 * 2**30  # bytes of a file


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def bytes_of(size: str) -> int:
    """A size in words, as transformers reads it: 5GB are 5,000,000,000 bytes."""
    return int(float(size[:-2]) * UNITS[size[-2:].upper()])


class WeightShards:
    """Gathers tensors until they fill a file. `close` gives the files their names and writes the index."""

    def __init__(self, folder: Path, most: int = SHARD) -> None:
        """most: bytes of a file; a larger tensor has a file of its own."""
        self.folder, self.most = folder, most
        self.gathered: dict[str, Tensor] = {}
        self.size = 0
        self.files: list[list[str]] = []  # names of tensors, by file
        self.total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors by name, from any device; they must not change any more."""
        for name, value in tensors.items():
            if self.gathered and self.size + value.nbytes > self.most:
                self._write()
            self.gathered[name] = value.detach().cpu().contiguous()
            self.size += value.nbytes

    def close(self) -> None:
        """Write what is left, and the index where there are several files."""
        if self.gathered:
            self._write()
        if len(self.files) == 1:
            self._file(0).rename(self.folder / SINGLE)
            return
        names = [f"model-{number:05d}-of-{len(self.files):05d}.safetensors" for number in range(1, len(self.files) + 1)]
        for number, name in enumerate(names):
            self._file(number).rename(self.folder / name)
        where = {tensor: name for name, tensors in zip(names, self.files, strict=True) for tensor in tensors}
        content = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(where.items()))}
        (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        save_file(self.gathered, self._file(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.gathered))
        self.total += self.size
        self.gathered, self.size = {}, 0

    def _file(self, number: int) -> Path:
        return self.folder / f"unnamed-{number}.safetensors"
