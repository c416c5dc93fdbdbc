"""Which messages a process of the command line shows: this library's own, and nothing that others say on the way."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


def show_own_messages(handler: logging.Handler, quiet: bool) -> None:
    """Give this library's own messages to `handler`, with `quiet` its errors only, and silence all others."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for other in ("huggingface_hub", "matplotlib"):  # the second tells of a home that cannot be written
        logging.getLogger(other).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    logger = logging.getLogger("fastpeft")
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


@contextmanager
def at_least(name: str, level: int) -> Iterator[None]:
    """Show no messages of a package below this level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(max(before, level))
    try:
        yield
    finally:
        logger.setLevel(before)
