"""A teacher's largest log-probabilities on disk: compressed row by row, in shards with checksums.

A row is one row of a packed dataset: n scored positions, k entries each. The entries of a position are ordered by
probability, so that the bit patterns of -log p, as integers, ascend: their differences are small, and every byte of a
difference or of a token id goes to a plane of its own, which deflate compresses well.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transmla.data.labelled import TEACHER_ONLY
from transmla.errors import RecipeError
from transmla.files import PARTIAL, fsync, read_json, save_whole
from transmla.sources.file_digests import known_digests

INDEX = "index.json"

FORMAT = 1

WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes of a stored log-probability

ID_BYTES = 3  # vocabularies are below 2^24

_HEADER = struct.Struct("<IIB")  # n, k, number of planes; then the planes' compressed sizes

_SIZE = struct.Struct("<I")


def _patterns(surprise: Tensor, dtype: str) -> np.ndarray:
    """-log p >= 0 as the integers that its floating-point numbers are written with; they have the numbers' order."""
    if dtype == "bfloat16":
        return surprise.to(torch.bfloat16).view(torch.int16).numpy().astype(np.int64)
    return surprise.numpy().astype(dtype).view(np.uint16 if dtype == "float16" else np.uint32).astype(np.int64)


def _numbers(patterns: np.ndarray, dtype: str) -> Tensor:
    if dtype == "float16":
        return torch.from_numpy(patterns.astype(np.uint16).view(np.float16).astype(np.float32))
    shifted = patterns << 16 if dtype == "bfloat16" else patterns
    return torch.from_numpy(shifted.astype(np.uint32).view(np.float32))


def _planes(values: np.ndarray, count: int) -> list[bytes]:
    return [zlib.compress(((values >> (8 * byte)) & 255).astype(np.uint8).tobytes(), 6) for byte in range(count)]


def encode(ids: Tensor, logp: Tensor, dtype: str) -> bytes:
    """One row. ids, logp: [n, k], by descending logp along k; logp is rounded to `dtype`."""
    surprise = (0.0 - logp.float()).clamp(min=0.0).cpu().contiguous()  # never -0.0, whose pattern is not 0
    steps = np.diff(_patterns(surprise, dtype), axis=1, prepend=0)
    assert (steps >= 0).all(), "log-probabilities must descend"
    planes = _planes(ids.cpu().numpy().astype(np.int64), ID_BYTES) + _planes(steps.T, WIDTHS[dtype])
    sizes = b"".join(_SIZE.pack(len(plane)) for plane in planes)
    return _HEADER.pack(*ids.shape, len(planes)) + sizes + b"".join(planes)


def decode(blob: bytes | memoryview, dtype: str) -> tuple[Tensor, Tensor]:
    """The inverse of `encode`: ids [n, k] int64, logp [n, k] float32."""
    count, k, planes = _HEADER.unpack_from(blob)
    start = _HEADER.size + planes * _SIZE.size
    found = []
    for plane in range(planes):
        (size,) = _SIZE.unpack_from(blob, _HEADER.size + plane * _SIZE.size)
        found.append(np.frombuffer(zlib.decompress(blob[start : start + size]), np.uint8).astype(np.int64))
        start += size
    ids: Any = sum(plane << (8 * byte) for byte, plane in enumerate(found[:ID_BYTES]))
    steps: Any = sum(plane << (8 * byte) for byte, plane in enumerate(found[ID_BYTES:]))
    surprise = _numbers(np.cumsum(steps.reshape(k, count).T, axis=1), dtype)
    return torch.from_numpy(ids.reshape(count, k)), -surprise


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of a tokenizer's vocabulary: equal digests, equal meaning of every token id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def data_digest(data: Dataset) -> str:
    """Of a packed dataset: its token ids, labels and borders between documents, row by row."""
    digest = hashlib.sha256()
    columns = sorted(set(data.column_names) & {"input_ids", "labels", "seq_lengths"})
    digest.update(json.dumps([columns, len(data)]).encode())
    for batch in data.select_columns(columns).with_format("arrow").iter(batch_size=256):
        found = {}
        for column in columns:
            values = batch[column].combine_chunks()
            digest.update(values.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
            found[column] = values.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
            if column == "labels":  # a token that is scored is, whatever against
                found[column] = np.where(found[column] == TEACHER_ONLY, found["input_ids"], found[column])
            digest.update(found[column].tobytes())
    return digest.hexdigest()


def _index_digest(index: dict[str, Any]) -> str:
    content = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path, key: str = "recover.N.record") -> dict[str, Any] | None:
    """The index of a recording: `inputs` (what it was made from) and `shards`; None where nothing is recorded.

    Raises:
        RecipeError: it is not what was written.
    """
    file = folder / INDEX
    if not file.is_file():
        return None
    index = read_json(file)
    if not isinstance(index, dict) or index.get("sha256") != _index_digest(index):
        raise RecipeError(key, f"{file} is damaged; remove {folder} and run transmla record again")
    return index


def _damaged(
    folder: Path, shards: Sequence[dict[str, Any]], digests: Callable[[list[Path]], Sequence[str]]
) -> list[str]:
    """The files of shards that are missing, cut off or of another content than was written."""
    there = []
    for shard in shards:
        file = folder / shard["file"]
        if file.is_file() and file.stat().st_size == sum(shard["bytes"]):
            there.append(shard)
    found = digests([folder / shard["file"] for shard in there])
    good = {shard["file"] for shard, digest in zip(there, found, strict=True) if digest == shard["sha256"]}
    return [shard["file"] for shard in shards if shard["file"] not in good]


def check_inputs(folder: Path, index: dict[str, Any], key: str, **wanted: object) -> None:
    """Refuse a recording that was made from something else.

    Raises:
        RecipeError: names the first difference.
    """
    for name, value in {"format": FORMAT, **wanted}.items():
        found = index["inputs"].get(name)
        if found != value:
            short = f" ({found!s:.16}, not {value!s:.16})"
            raise RecipeError(
                key, f"{folder} was recorded with another {name}{short}; remove it and run transmla record"
            )


class ShardAppender:
    """Appends shards to a recording. A shard and its entry in the index appear whole or not at all.

    Shards that are damaged are left out, so that their rows are recorded again.

    Args:
        inputs: what the recording is made from; an existing one must be equal.
        key: recipe key, for errors.

    Raises:
        RecipeError: the folder holds a recording of other inputs.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], key: str) -> None:
        self.folder = folder
        index = read_index(folder, key)
        if index is None:
            folder.mkdir(parents=True, exist_ok=True)
            index = {"inputs": {"format": FORMAT, **inputs}, "shards": []}
        self.index: dict[str, Any] = index
        check_inputs(folder, index, key, **inputs)
        damaged = _damaged(folder, index["shards"], known_digests)
        index["shards"] = [shard for shard in index["shards"] if shard["file"] not in damaged]

    @property
    def rows(self) -> set[int]:
        """The rows that are recorded."""
        return {row for shard in self.index["shards"] for row in shard["rows"]}

    def add(self, rows: Sequence[int], counts: Sequence[int], blobs: Sequence[bytes]) -> None:
        """Write one shard. counts: scored positions of each row; blobs: its `encode`."""
        names = {shard["file"] for shard in self.index["shards"]}
        name = next(name for number in range(len(names) + 1) if (name := f"{number:05d}.bin") not in names)
        content = b"".join(blobs)
        partial = self.folder / f"{PARTIAL}-{name}"
        partial.write_bytes(content)
        fsync(partial)
        os.replace(partial, self.folder / name)
        self.index["shards"].append(
            {
                "file": name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "rows": list(rows),
                "positions": list(counts),
                "bytes": [len(blob) for blob in blobs],
            }
        )
        self.index["sha256"] = _index_digest(self.index)
        save_whole(self.folder / INDEX, json.dumps(self.index))
        fsync(self.folder)


class RecordedTeacher:
    """Reads a recording; no model is needed. Shards are memory-mapped, and checked when first touched.

    Args:
        folder: what `transmla record` wrote.
        key: recipe key, for errors.

    Raises:
        RecipeError: there is no recording, or a shard is missing.
    """

    def __init__(self, folder: str | Path, key: str = "recover.N.teacher") -> None:
        self.folder, self.key = Path(folder), key
        index = read_index(self.folder, key)
        if index is None:
            raise RecipeError(key, f"no recording in {folder}; run transmla record first, or use teacher: source")
        self.index: dict[str, Any] = index
        self.dtype: str = index["inputs"]["dtype"]
        self.top_k: int = index["inputs"]["top_k"]
        self._where: dict[int, tuple[int, int, int]] = {}  # row: shard, start, end
        for number, shard in enumerate(index["shards"]):
            file = self.folder / shard["file"]
            if not file.is_file() or file.stat().st_size != sum(shard["bytes"]):
                raise RecipeError(key, f"{file} is missing or cut off; run transmla record again")
            end = 0
            for row, size in zip(shard["rows"], shard["bytes"], strict=True):
                self._where[row] = (number, end, end + size)
                end += size
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self._where)

    def check_content(self) -> None:
        """Refuse a recording that is damaged, before a model is loaded; shards that have not changed are not read.

        Raises:
            RecipeError: names the first damaged shard.
        """
        if damaged := _damaged(self.folder, self.index["shards"], known_digests):
            raise RecipeError(self.key, f"{self.folder / damaged[0]} is damaged; run transmla record again")

    def check(self, tokenizer: PreTrainedTokenizerBase, data: Dataset) -> None:
        """Refuse a recording of another vocabulary or of another packed dataset than a trainer's.

        Args:
            data: a trainer's packed dataset; a column `row` does not matter.

        Raises:
            RecipeError: names what differs.
        """
        wanted = {"vocabulary": vocabulary_digest(tokenizer), "packed data": data_digest(data)}
        check_inputs(self.folder, self.index, self.key, **wanted)

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The scored positions of rows, one row after the other.

        Returns:
            ids [n, k] int64 and logp [n, k] float32, by descending logp.

        Raises:
            RecipeError: a row is not recorded, or its shard does not have its checksum.
        """
        parts = [decode(self._blob(int(row)), self.dtype) for row in indices]
        return torch.cat([ids for ids, _ in parts]), torch.cat([logp for _, logp in parts])

    def _blob(self, row: int) -> bytes:
        if row not in self._where:
            raise RecipeError(
                self.key, f"row {row} is not in {self.folder}; run transmla record with the same tokens and seed"
            )
        number, start, end = self._where[row]
        if number not in self._maps:
            shard = self.index["shards"][number]
            with (self.folder / shard["file"]).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hashlib.sha256(mapped).hexdigest() != shard["sha256"]:
                raise RecipeError(self.key, f"{file.name} is damaged; run transmla record again")
            self._maps[number] = mapped
        return self._maps[number][start:end]
