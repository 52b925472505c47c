"""Rows of data files, one after the other. What cannot be read is refused with its file and row, counted from 1."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".jsonl.gz": "json", ".txt.gz": "text"}

UTF8_MARK = b"\xef\xbb\xbf"

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

ROWS = 256  # that are read of a parquet file at a time

BLOCK = 1 << 20  # bytes that are read of a text file at a time


class Unreadable(ValueError):
    """A file or a row that cannot be used. The message says which, why, and how to mend it."""


@dataclass(frozen=True)
class Row:
    """A row of a file, as it stands there. size: bytes of the file, unpacked, that were read so far, about."""

    number: int
    content: dict[str, Any]
    size: int


def format_of(file: Path) -> str | None:
    """The format of a file by its name, a value of `FORMATS`; None where it is unknown."""
    return next((kind for suffix, kind in FORMATS.items() if file.name.lower().endswith(suffix)), None)


def mark_of(file: Path) -> tuple[str, int, int, int, int]:
    """A file's name and what changes with its content: size, two times and inode."""
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def rows_of(
    file: Path, *, columns: Collection[str], separator: str | None = None, limit: int | None = None
) -> Iterator[Row]:
    """The rows of a file; blank lines are passed over, and counted.

    Args:
        columns: of a parquet file, which to read; one that is not there is left out.
        separator: of a text file, what stands between two rows; None: it is one row.
        limit: bytes of a text file to read; the other formats are read row by row, and who asks may stop.

    Raises:
        Unreadable: the file or a row of it cannot be read.
    """
    kind = format_of(file)
    assert kind is not None, "who names the file knows its format"
    if kind == "parquet":
        return _parquet_rows(file, columns)
    return _json_rows(file) if kind == "json" else _text_rows(file, separator, limit)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A file, unpacked where its name says that it is packed."""
    try:
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            yield stream
    except EOFError:
        raise Unreadable(f"{file} cannot be read: its packed content is cut off; copy the file again") from None
    except gzip.BadGzipFile as error:
        wrong = "CRC" in str(error) or "length" in str(error)
        reason = "it is damaged; copy the file again" if wrong else "it is not packed by gzip; rename it, or pack it"
        raise Unreadable(f"{file} cannot be read: {reason}") from None
    except zlib.error:
        raise Unreadable(f"{file} cannot be read: it is damaged; copy the file again") from None
    except OSError as error:
        raise Unreadable(f"{file} cannot be read: {error.strerror or error}; correct its name or its rights") from None


def _json_rows(file: Path) -> Iterator[Row]:
    size = 0
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            size += len(line)
            if number == 1:
                if line.startswith(UTF16_MARKS):
                    raise Unreadable(f"{file} is in UTF-16; save it as UTF-8")
                line = line.removeprefix(UTF8_MARK)
            if line.strip():
                yield Row(number, _json_row(line, f"{file}, row {number}"), size)


def _json_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unlike_keys)
    except UnicodeDecodeError as error:
        raise Unreadable(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos + 1}"
        raise Unreadable(f"{where} is no JSON object, or is cut off ({reason}); write one object per line") from None
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, endless brackets
        raise Unreadable(f"{where}: {str(error)[:120]}; mend the row") from None
    if not isinstance(row, dict):
        raise Unreadable(f"{where} is no JSON object; write one object per line")
    if SURROGATE.search(line):
        _require_letters(row, where)
    return row


def _require_letters(value: Any, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and nothing else.

    Raises:
        Unreadable: there is one.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Unreadable(f"{where} has half of a letter (a lone surrogate); mend the row") from None


def _unlike_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.60} stands there twice")
    return found


def _text_rows(file: Path, separator: str | None, limit: int | None) -> Iterator[Row]:
    """The pieces of a text file between separators. A piece and a block of the file are held at a time."""
    size = number = 0
    held: list[str] = []  # of the piece that has no end yet, all but `tail`
    tail = ""  # in which a separator may begin
    for block, size in _text_blocks(file, limit):
        *pieces, rest = (tail + block).split(separator) if separator else [block]
        for piece in pieces:
            number += 1
            text = "".join([*held, piece]).strip()
            held = []
            if text:
                yield Row(number, {"text": text}, size)
        border = len(rest) if separator is None else max(0, len(rest) - len(separator) + 1)
        held.append(rest[:border])
        tail = rest[border:]
    text = "".join([*held, tail]).strip()
    if text:
        yield Row(number + 1, {"text": text}, size)


def _text_blocks(file: Path, limit: int | None) -> Iterator[tuple[str, int]]:
    """A text file's letters, block by block, with the bytes read so far: above `limit` where that cuts the file off."""
    letters = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    size = lines = 0
    cut = False
    with _opened(file) as stream:
        while not cut and (block := stream.read(BLOCK)):
            if size == 0:
                if block.startswith(UTF16_MARKS):
                    raise Unreadable(f"{file} is in UTF-16; save it as UTF-8")
                size, block = len(block), block.removeprefix(UTF8_MARK)
            else:
                size += len(block)
            if limit is not None and size > limit:
                cut, block = True, block[: limit - size]
            text = _decoded(letters, block, file, lines)
            lines += block.count(b"\n")
            yield text, size
    if not cut:  # else the last letter may not be whole
        yield _decoded(letters, b"", file, lines), size


def _decoded(letters: Any, block: bytes, file: Path, lines: int) -> str:
    """The letters of a block. lines: that came before it."""
    try:
        text: str = letters.decode(block, final=not block)
    except UnicodeDecodeError as error:
        line = lines + error.object.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"{file}, line {line} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        line = lines + text.count("\n", 0, text.index("\0")) + 1
        raise Unreadable(f"{file}, line {line} has zero bytes: it is no text; name a text file")
    return text


def columns_of_file(file: Path) -> set[str] | None:
    """The columns of a file: of a parquet file all, of a JSON file those of its first row; None: it has no row.

    Raises:
        Unreadable: as `rows_of`.
    """
    if format_of(file) == "text":
        return {"text"}
    if format_of(file) == "json":
        first = next(_json_rows(file), None)
        return None if first is None else set(first.content)
    with _parquet_errors(file):
        table = _parquet_file(file)
        return set(table.schema_arrow.names) if table.metadata.num_rows else None


def _parquet_file(file: Path) -> Any:
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(file, page_checksum_verification=True)
    names = table.schema_arrow.names
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise Unreadable(f"{file} has two columns called {double!r}; rename one")
    return table


def _parquet_rows(file: Path, columns: Collection[str]) -> Iterator[Row]:
    size = 0
    with _parquet_errors(file) as read:
        table = _parquet_file(file)
        names = [name for name in table.schema_arrow.names if name in columns]
        for batch in table.iter_batches(batch_size=ROWS, columns=names):
            share = batch.nbytes // max(1, len(batch))
            for index in range(len(batch)):
                size += share
                read[0] += 1
                yield Row(read[0], {name: batch.column(name)[index].as_py() for name in names}, size)


@contextmanager
def _parquet_errors(file: Path) -> Iterator[list[int]]:
    """Turns pyarrow's errors into one; yields a place for the number of rows read."""
    import pyarrow as arrow

    read = [0]
    try:
        yield read
    except Unreadable:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:  # no parquet, cut off, a page damaged, not UTF-8
        reason = " ".join(str(error).split())[:120]
        where = f"{file}, row {read[0]}," if read[0] else str(file)
        raise Unreadable(f"{where} cannot be read as parquet: {reason}; write the file again") from None
