"""Let a run outlive its console: the reader of a pipe ends, a terminal closes, a disk is full.

A run of hours must not fail because of a line that nobody can read. Its results are in its files,
and its exit code and status.json agree.
"""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

_NAMES = {1: "standard output", 2: "standard error"}


def open_missing_streams() -> None:
    """Open /dev/null for each of the standard streams that was closed when the process started.

    Otherwise the next file that is opened gets the number of the closed stream, and a library that
    prints a warning would write it into that file.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `fd`
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115


def escape_unencodable() -> None:
    """Let standard output escape the characters that its encoding lacks.

    Otherwise a name of a file that the terminal cannot show would be an error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def tolerate_lost_output() -> None:
    """Drop text that standard output cannot take, instead of raising an error.

    A stream that a caller has replaced, as tests do, stays as it is.
    """
    if sys.stdout is sys.__stdout__ or sys.__stdout__ is None:
        sys.stdout = _lossy(sys.stdout)


def tolerate_lost_errors() -> None:
    """Do the same for standard error: a message that nobody reads must not change the exit code."""
    if sys.stderr is sys.__stderr__ or sys.__stderr__ is None:
        sys.stderr = _lossy(sys.stderr)


class _LossyFile(io.FileIO):
    """A file whose writes always succeed. The first one that is lost is reported, if possible."""

    _is_reported = False

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError as error:
            self._report(error)
            return size
        return size if written is None else written  # None: a full pipe that must not block

    def _report(self, error: OSError) -> None:
        if self._is_reported:
            return
        self._is_reported = True
        text = (
            f"hqqtrain: {_NAMES[self.fileno()]} cannot be written to ({error.strerror}); "
            "the work continues without it.\n"
        )
        with suppress(OSError):
            os.write(2, text.encode())


def _lossy(stream: TextIO) -> TextIO:
    """Return a stream to the file descriptor of `stream` that drops what it cannot write."""
    with suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LossyFile(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",  # a name that the terminal cannot show is no error either
        line_buffering=True,
    )
