"""The rows of a text that is being written: put into their file while the rest is still sampled."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transmla.generate.text_rows import TextRows
from transmla.run.sampled_batches import SampledBatches


def save_rows(rows: Iterable[dict[str, Any]], file: Path, mode: str = "w") -> None:
    """Rows as lines of JSON. mode: as `open`'s."""
    with file.open(mode, encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


class WrittenRows:
    """The file of a text's rows. It holds those of the first batches that follow one another, until they have as many
    tokens as are wanted.

    Putting 60,000 texts together takes a CPU 8 s, in which a GPU would wait if it were done after the last batch.
    """

    def __init__(self, file: Path, rows: TextRows, batches: SampledBatches, tokens: int) -> None:
        """file: there is none yet. tokens: to be sampled, end tokens included."""
        self.file, self.rows, self.batches = file, rows, batches
        self._missing, self._next = tokens, 0

    def extend(self) -> None:
        """Append the rows of further batches that are there."""
        while self._missing > 0 and (tokens := self.batches.tokens(self._next)) is not None:
            samples = self.batches.samples(self._next)
            save_rows(self.rows.of(self._next, samples), self.file, "a")
            self._missing, self._next = self._missing - tokens, self._next + 1

    def finish(self) -> Path:
        """The file with all of them, when their batches are there."""
        self.batches.index()
        self.extend()
        assert self._missing <= 0, "they were just sampled"
        return self.file
