"""Python's garbage collector while modules are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_frozen = False


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector, which would look through half a million objects of imported modules many times, and once
    more when the process ends: of five seconds until a mistake is named, nearly two.

    What is there in the end is never looked at again. Only the first time in a process: later there may be garbage.
    """
    global _frozen
    if _frozen or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        _frozen = True
        gc.freeze()
        gc.enable()
