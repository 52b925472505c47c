"""transmla's own one line about a model instead of what transformers logs and shows while it reads one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_loading(*, bar: bool = False) -> Iterator[None]:
    """Without transformers' warnings. bar: its progress bar stays; without, where nothing is loaded or only a part."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    if not bar:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
