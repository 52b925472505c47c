"""The rows of a text that is being written: put into their file while the rest is still sampled."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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
    tokens as are wanted. A context, within which one thread may add to it.

    Putting 60,000 texts together takes a CPU 8 s, in which a GPU would wait if it were done after the last batch.
    """

    def __init__(self, file: Path, rows: TextRows, batches: SampledBatches, tokens: int) -> None:
        """file: there is none yet. tokens: to be sampled, end tokens included."""
        self.file, self.rows, self.batches = file, rows, batches
        self._missing, self._next = tokens, 0
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._extending: Future[None] | None = None
        self._left = False  # by an error or a signal: after a resume the thread may have much to do

    def __enter__(self) -> WrittenRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._thread.shutdown()

    def follow(self) -> None:
        """Begin to add the rows of what is there by now, unless the thread is at it still.

        Raises:
            OSError: they could not be written before.
        """
        if self._extending is None or self._extending.done():
            if self._extending is not None:
                self._extending.result()
            self._extending = self._thread.submit(self._extend)

    def finish(self) -> Path:
        """The file with all of them, when their batches are there."""
        if self._extending is not None:
            self._extending.result()
        self.batches.index()
        self._extend()
        assert self._missing <= 0, "they were just sampled"
        return self.file

    def _extend(self) -> None:
        while not self._left and self._missing > 0 and (tokens := self.batches.tokens(self._next)) is not None:
            samples = self.batches.samples(self._next)
            save_rows(self.rows.of(self._next, samples), self.file, "a")
            self._missing, self._next = self._missing - tokens, self._next + 1
