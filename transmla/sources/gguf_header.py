"""Whether a GGUF file is one, and is there as a whole: seen from its header, whose tables transformers reads slowly."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from transmla.errors import RecipeError
from transmla.sources.safetensors_header import DamagedFileError, require_content
from transmla.sources.weight_files import AGAIN

FIXED = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
FACTS = {
    b"general.license": "license",
    b"general.license.name": "license_name",
    b"general.license.link": "license_link",
    b"general.languages": "language",
}
TOKENIZER = b"tokenizer.ggml."  # numbers and texts below it are kept, its lists are not
MOST = 1000  # languages
ALIGNMENT = 32  # bytes, where the header names no other


def check_gguf(file: Path, key: str) -> None:
    """Check that a file is a GGUF and holds all the bytes that its header describes. key: for errors.

    Raises:
        RecipeError: it is not there, no GGUF, or cut off.
    """
    try:
        require_content(file)
        with file.open("rb") as content:
            needed = _Reader(mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)).size()
        if needed > file.stat().st_size:
            raise DamagedFileError(f"{file} has {file.stat().st_size:,} bytes where its header describes {needed:,}")
    except DamagedFileError as error:
        raise RecipeError(key, f"{error}; {AGAIN}") from None
    except (ValueError, struct.error, KeyError, OverflowError, RecursionError):  # it is no header
        raise RecipeError(key, f"{file} is no GGUF that can be read; {AGAIN}") from None


def header_facts(file: Path) -> dict[str, str | list[str]]:
    """What the header of a GGUF that `check_gguf` accepts says of licence and languages, by the hub's names for it."""
    facts = _walked(file).facts
    return {FACTS[name]: value for name, value in facts.items() if value}


def tokenizer_entries(file: Path) -> dict[str, float | str]:
    """What the header of a GGUF that `check_gguf` accepts says of its tokenizer in single texts and numbers, by the
    format's own names."""
    return {name.decode(): value for name, value in _walked(file).tokenizer.items()}


def _walked(file: Path) -> _Reader:
    with file.open("rb") as content:
        reader = _Reader(mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ))
        reader.size()
    return reader


class _Reader:
    """Walks through a header; see https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    facts: texts of the entries named in `FACTS`, after the walk. tokenizer: single texts and numbers below `TOKENIZER`.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.position = 0
        self.facts: dict[bytes, str | list[str]] = {}
        self.tokenizer: dict[bytes, float | str] = {}

    def size(self) -> int:
        """Bytes that the file has as a whole."""
        if self.content[:4] != b"GGUF":
            raise ValueError("it does not begin as one")
        self.position = 4
        version, tensors, entries = self._numbers("IQQ")
        if version not in (2, 3):
            raise ValueError("of a version that transformers does not read")
        alignment = ALIGNMENT
        for _ in range(entries):
            name = self._string()
            kind = GGUFValueType(self._numbers("I")[0])
            if name in FACTS and kind in (GGUFValueType.STRING, GGUFValueType.ARRAY):
                self._keep(name, kind)
                continue
            if name.startswith(TOKENIZER) and kind == GGUFValueType.STRING:
                self.tokenizer[name] = self._string().decode(errors="replace")
                continue
            value = self._value(kind)
            if name.startswith(TOKENIZER) and value is not None:
                self.tokenizer[name] = value
            if name == b"general.alignment" and value:
                alignment = int(value)
        end = 0
        for _ in range(tensors):
            self._string()
            shape = self._numbers(f"{self._numbers('I')[0]}Q")
            quantisation, offset = self._numbers("IQ")
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(quantisation)]
            end = max(end, offset + math.prod(shape) // block * width)
        return -(-self.position // alignment) * alignment + end

    def _numbers(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(f"<{form}", self.content, self.position)
        self.position += struct.calcsize(f"<{form}")
        return found

    def _string(self) -> bytes:
        (length,) = self._numbers("Q")
        start, self.position = self.position, self.position + length
        return self.content[start : self.position]

    def _keep(self, name: bytes, kind: GGUFValueType) -> None:
        """A text, or a short list of them; another list is skipped."""
        start = self.position
        if kind == GGUFValueType.STRING:
            self.facts[name] = self._string().decode(errors="replace")
            return
        inner, count = self._numbers("IQ")
        if GGUFValueType(inner) == GGUFValueType.STRING and count <= MOST:
            self.facts[name] = [self._string().decode(errors="replace") for _ in range(count)]
        else:
            self.position = start
            self._value(kind)

    def _value(self, kind: GGUFValueType) -> float | None:
        """A number; None for what is skipped."""
        if kind in FIXED:
            return self._numbers(FIXED[kind])[0]
        if kind == GGUFValueType.STRING:
            self._string()
            return None
        inner, count = self._numbers("IQ")
        if GGUFValueType(inner) in FIXED:
            self.position += count * struct.calcsize(f"<{FIXED[GGUFValueType(inner)]}")
            return None
        if GGUFValueType(inner) == GGUFValueType.STRING:  # a vocabulary: hundreds of thousands
            position, length = self.position, struct.Struct("<Q").unpack_from
            for _ in range(count):
                position += 8 + length(self.content, position)[0]
            self.position = position
            return None
        for _ in range(count):
            self._value(GGUFValueType(inner))
        return None
