"""One piece of work at a time in a thread beside the training loop, whose error is not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one function at a time in a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin with a piece of work; the one before must have been waited for."""
        assert self._thread is None, "one piece of work at a time"

        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised in the loop, by `check`
                self._error = error

        # A second interrupt while it is waited for ends the process: what it writes counts only when it is whole.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing runs, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise the error of the work, if it has ended in one, once."""
        error, self._error = self._error, None
        if error is not None:
            self.join()
            raise error
