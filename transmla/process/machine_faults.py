"""What a machine lacks, in one sentence: memory, room on a disk, a file that was there."""

from __future__ import annotations

import errno
import os
import re
import sys

# Of an OSError, what is the machine's or another program's doing.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
LOST = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR)
NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed writing")
MEMORY_OF_LIBRARIES = re.compile(
    r"DefaultCPUAllocator: |Cannot allocate memory|std::bad_alloc|CUDA error: out of memory"
    r"|CU(BLAS|DNN|SOLVER|FFT)_STATUS_ALLOC_FAILED"
)
WORKER = re.compile(
    r"DataLoader worker .*(killed by signal|exited unexpectedly)|One of the subprocesses has abruptly died"
)
MEMORY = "make its batch_size, max_length or tokens per step smaller, or free memory; the same command goes on"

WORKERS = "use fewer (dataloader_num_workers, dataset_num_proc), or free memory; the same command goes on"


def fault_of(error: BaseException) -> str | None:
    """One sentence with the remedy; None of an error that is not the machine's.

    Libraries raise errors of their own from the machine's, or while they handle it: what these came of counts too. A
    file that is not there is an answer as often as a fault, and counts only where the error says that it came of it.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    said = True
    while cause is not None and cause not in seen:
        if (sentence := _shortage(cause)) is not None or (said and (sentence := _lost(cause)) is not None):
            return sentence
        seen.append(cause)
        said = said and cause.__cause__ is not None
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _shortage(error: BaseException) -> str | None:
    """What is said of want of memory, of room on a disk, and of workers."""
    text = _text(error)
    if is_memory(error):
        return f"out of memory: {text or 'the process could not get any more'}; {MEMORY}"
    if isinstance(error, RuntimeError) and WORKER.search(text):
        return f"a process that prepares data was ended, most often for want of memory: {text}; {WORKERS}"
    if (isinstance(error, OSError) and error.errno in DISK) or NO_ROOM.search(text):
        return f"the disk refuses: {text}; make room, or mend it, and the same command goes on"
    return None


def _lost(error: BaseException) -> str | None:
    """What is said of a file that was there; a name without a folder is a program's."""
    text = _text(error)
    lost = isinstance(error, OSError) and error.errno in LOST and os.sep in str(error.filename)
    if lost or (type(error).__name__ == "SafetensorError" and "No such file" in text):
        return f"a file is gone or closed to this user: {text}; the same command makes again what it can"
    return None


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def is_memory(error: BaseException) -> bool:
    """Whether it is want of memory, of the machine or of a device."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return (isinstance(error, OSError) and error.errno == errno.ENOMEM) or (
        isinstance(error, RuntimeError) and MEMORY_OF_LIBRARIES.search(str(error)) is not None
    )
