"""How a command ends: its exit code, and one line where somebody can mend what went wrong."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext

from transmla.errors import RecipeError
from transmla.process.machine_faults import fault_of
from transmla.process.siblings import rank
from transmla.process.stopping import FAILED, end_stopped, request
from transmla.process.watch import end_if_another_died, watched


def guarded(work: Callable[[], int], *, signals: bool = True) -> int:
    """The exit code of a command, whose failures that a user can mend are one line; a signal ends the process.

    signals: false leaves signals to Python and to the command.
    """
    with watched() if signals else nullcontext():
        try:
            code = work()
            sys.stdout.flush()  # a reader that is gone shows here, not in Python's last words
            return code
        except RecipeError as error:
            request().held += 1  # the error is said, whatever comes meanwhile
            print_error(str(error))
        except Exception as error:
            end_if_another_died()
            if isinstance(error, BrokenPipeError) and _unread():
                print_error("nobody reads standard output any more; the same command goes on")
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in the buffer
                return 128 + signal.SIGPIPE
            if request().number:
                end_stopped(f" ({type(error).__name__} while it ended)")
            if (sentence := fault_of(error)) is None:
                raise
            print_error(sentence)
        return FAILED


def _unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as behind `| head`."""
    asked = select.poll()
    asked.register(1, 0)
    return any(events & select.POLLERR for _, events in asked.poll(0))


def print_error(text: str) -> None:
    """One line on stderr, which says of which process it is."""
    print(f"error on process {rank()}: {text}" if rank() else f"error: {text}", file=sys.stderr, flush=True)
