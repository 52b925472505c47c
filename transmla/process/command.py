"""How a command ends: its exit code, and one line where somebody can mend what went wrong."""

from __future__ import annotations

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
            return work()
        except RecipeError as error:
            request().held += 1  # the error is said, whatever comes meanwhile
            print_error(str(error))
        except Exception as error:
            end_if_another_died()
            if request().number:
                end_stopped(f" ({type(error).__name__} while it ended)")
            if (sentence := fault_of(error)) is None:
                raise
            print_error(sentence)
        return FAILED


def print_error(text: str) -> None:
    """One line on stderr, which says of which process it is."""
    print(f"error on process {rank()}: {text}" if rank() else f"error: {text}", file=sys.stderr, flush=True)
