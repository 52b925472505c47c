"""Many samples, batch by batch, on several processes, into append-only files; it may be interrupted at any time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from transmla.files import fsync, remove, save_whole
from transmla.generate.sampler import Sample, Sampler, batch_seed
from transmla.recipe.writing import Sampling


@dataclass(frozen=True)
class Place:
    """Where a batch is in the files; the tokens that were sampled in it, end tokens included, and the seconds it
    took."""

    file: Path
    offset: int
    tokens: int
    seconds: float


Batches = dict[int, Place]


CHECK = b',"check":'


def _line(row: dict[str, Any]) -> bytes:
    """A batch's line. Its last entry is a digest of what stands before it."""
    content = json.dumps(row, separators=(",", ":")).encode()[:-1]
    return content + CHECK + _check(content)


def _check(content: bytes) -> bytes:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"}}\n'.encode()


def _row(line: bytes) -> dict[str, Any] | None:
    """A batch's line; None of one that is not as it was written."""
    content, _, check = line.rpartition(CHECK)
    return json.loads(content + b"}") if check == _check(content) else None


class SampledBatches:
    """The finished batches: one file per process, one line per batch, synced while the next batch is sampled.

    A batch's samples follow from its number alone, so that another number of processes may go on.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        """digest: of what the samples follow from; batches of another one are thrown away by `open`."""
        self.folder, self.digest = folder, digest
        self._found: Batches = {}
        self._read: dict[Path, int] = {}  # bytes of every file that were looked at

    def open(self) -> int:
        """Make the folder, by one process: clear what is of other settings, and lines that are cut off or damaged.

        Returns:
            how many lines were not as they were written; their batches are missing now.
        """
        marker = self.folder / "fingerprint"
        if not marker.is_file() or marker.read_bytes() != self.digest.encode():
            remove(self.folder)
            save_whole(marker, self.digest)
        broken = 0
        for file in self.folder.glob("*.jsonl"):
            lines = file.read_bytes().splitlines(keepends=True)
            good = [line for line in lines if line.endswith(b"\n") and _row(line) is not None]
            if len(good) < len(lines):
                broken += len(lines) - len(good)
                save_whole(file, b"".join(good).decode())
        return broken

    def index(self) -> Batches:
        """The batches that are there; reads only what was added since the last call."""
        for file in sorted(self.folder.glob("*.jsonl")):
            offset = self._read.get(file, 0)
            with file.open("rb") as lines:
                lines.seek(offset)
                for line in lines:
                    row = _row(line)
                    assert row is not None, "the folder was opened, which clears what is broken"
                    tokens = sum(len(sampled) + finished for sampled, finished in row["samples"])
                    self._found[row["batch"]] = Place(file, offset, tokens, row["seconds"])
                    offset += len(line)
            self._read[file] = offset
        return self._found

    def tokens(self, batch: int) -> int | None:
        """The tokens sampled in a batch; None of one that neither `index` nor `append` has seen yet."""
        return self._found[batch].tokens if batch in self._found else None

    def samples(self, batch: int) -> list[Sample]:
        """One batch, in the order of its prompts."""
        place = self.index()[batch] if batch not in self._found else self._found[batch]
        with place.file.open("rb") as lines:
            lines.seek(place.offset)
            return [Sample(tokens, finished) for tokens, finished in json.loads(lines.readline())["samples"]]

    def seconds(self) -> float:
        """What all batches took, whichever processes and attempts drew them."""
        return round(sum(place.seconds for place in self.index().values()), 2)

    def append(self, process: int, batch: int, samples: Sequence[Sample], seconds: float = 0.0) -> None:
        """Add a batch for good."""
        file, seconds = self.folder / f"{process:03d}.jsonl", round(seconds, 2)
        content = [[sample.tokens, sample.finished] for sample in samples]
        line = _line({"batch": batch, "seconds": seconds, "samples": content})
        with file.open("ab") as lines:
            offset = lines.tell()
            lines.write(line)
            lines.flush()
            os.fsync(lines.fileno())
        if not offset:
            fsync(self.folder)
        if self._read.get(file, 0) == offset:  # `index` need not read what was just written
            tokens = sum(len(sample.tokens) + sample.finished for sample in samples)
            self._found[batch], self._read[file] = Place(file, offset, tokens, seconds), offset + len(line)


def sample_missing(
    batches: SampledBatches,
    sampler: Callable[[], Sampler],
    prompts_of: Callable[[int], list[list[int]]],
    missing: Callable[[Batches], list[int]],
    settings: Sampling,
    *,
    seed: int,
    name: str,
    state: PartialState,
    stored: Callable[[], None] | None = None,
) -> None:
    """Sample batches until none is missing; every process calls this and returns when all are done.

    Args:
        sampler: makes the sampler; called only where a batch is missing.
        prompts_of: the prompts of a batch.
        missing: from the batches that are there, the numbers of those to sample next; asked again after each round.
        seed, name: a batch's own seed follows from them and its number.
        stored: called on the first process, in a thread, when it has stored a batch.
    """
    if state.is_main_process and (broken := batches.open()):
        state.print(f"[{name}] {broken} batches were cut off or damaged; they are sampled again", flush=True)

    def store(batch: int, samples: Sequence[Sample], seconds: float) -> None:
        batches.append(state.process_index, batch, samples, seconds)
        if stored is not None and state.is_main_process:
            stored()

    chosen: Sampler | None = None
    while True:
        wanted = [missing(batches.index()) if state.is_main_process else []]
        broadcast_object_list(wanted)  # also holds the others back until the folder is open
        if not wanted[0]:
            return
        chosen = chosen or sampler()
        own = wanted[0][state.process_index :: state.num_processes]
        # While a batch is sampled, one thread makes the next one's prompts and another stores the last one.
        with ThreadPoolExecutor(max_workers=1) as ahead, ThreadPoolExecutor(max_workers=1) as behind:
            prompts, storing = ahead.submit(prompts_of, own[0]) if own else None, None
            for place, batch in enumerate(tqdm(own, desc=name, unit="batch", disable=not state.is_main_process)):
                assert prompts is not None, "there is a batch"
                asked = prompts.result()
                if place + 1 < len(own):
                    prompts = ahead.submit(prompts_of, own[place + 1])
                started = time.monotonic()
                samples = chosen(asked, settings, batch_seed(seed, name, batch))
                taken = time.monotonic() - started
                if storing is not None:
                    storing.result()
                storing = behind.submit(store, batch, samples, taken)
            if storing is not None:
                storing.result()
        state.wait_for_everyone()


def all_of(count: int) -> Callable[[Batches], list[int]]:
    """`missing` of a fixed number of batches."""
    return lambda there: [batch for batch in range(count) if batch not in there]


def until(tokens: int, processes: int) -> Callable[[Batches], list[int]]:
    """`missing` of sampling that goes on until so many tokens are there.

    Each round has at least one batch per process, and at most twice as many as there are: what is likely to be missing
    is told from many batches before many are sampled, and of several processes none is left idle in a round.
    """

    def missing(there: Batches) -> list[int]:
        if enough(there, tokens) is not None:
            return []
        found = sum(place.tokens for place in there.values())
        likely = (tokens - found) * len(there) // found if found else 0
        count = max(processes, min(likely, 2 * len(there)) // processes * processes)
        free = (batch for batch in range(len(there) + count) if batch not in there)
        return list(islice(free, count))

    return missing


def enough(there: Batches, tokens: int) -> int | None:
    """How many of the first batches have so many tokens together; None: they are too few."""
    total = batch = 0
    while total < tokens:
        if batch not in there:
            return None
        total += there[batch].tokens
        batch += 1
    return batch
