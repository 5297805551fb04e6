"""Keep log lines, to repeat them elsewhere: in a later run, or in the process that has the log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

Line = tuple[int, str]
"""The level and the message of a line of the log."""


@contextmanager
def kept_log() -> Iterator[list[Line]]:
    """Yield a list that gets every line which this program logs in the context."""
    lines: list[Line] = []
    handler, logger = _Keeper(lines), logging.getLogger("hqqtrain")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


class _Keeper(logging.Handler):
    def __init__(self, lines: list[Line]) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.levelno, record.getMessage()))
