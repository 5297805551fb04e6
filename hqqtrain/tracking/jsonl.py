"""metrics.jsonl: one JSON object per logged row, written even if all other trackers fail."""

import errno
import json
import logging
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from hqqtrain.common.files import atomic_write, open_for_append
from hqqtrain.common.reading import parse_json
from hqqtrain.rundir.schema import GLOBAL_STEP

logger = logging.getLogger(__name__)

_MAX_LINE_BYTES = 1 << 24
"""Bytes of a line that are read at once; the errors of 10^5 layers are fewer."""

_TOO_LARGE = 1e300
"""A number from here on is none that a run logs, and plots cannot show it."""

SYNC_SECONDS = 10.0
"""Seconds between two fsync calls. A crash of the machine may lose the lines since the last one."""


class JsonlTracker:
    """Appends rows to `path`; a resumed run appends after the step that it resumes from.

    Every row has `train/global_step` and `time` (seconds since 1970). A number that is not finite
    becomes null, because JSON cannot represent it. Rows that do not fit on a full disk stay in
    memory and are written when there is space again.
    """

    shows_images = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._unwritten = b""
        self._last_sync = 0.0

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(self.path, step)
        fd = open_for_append(self.path)
        self._file = open(fd, "ab", buffering=0)  # noqa: SIM115 (closed by `finish`)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        row: dict[str, Any] = {GLOBAL_STEP: step, "time": round(time.time(), 3)}
        row |= {name: _finite(value) for name, value in metrics.items()}
        could_write = not self._unwritten  # whether the last row was written
        self._unwritten += (json.dumps(row) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if could_write:  # warn once, not at every row
                logger.warning("%s: cannot be written for now: %s", self.path, error)
        if time.monotonic() - self._last_sync > SYNC_SECONDS:
            self._sync()

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        self._sync()

    def log_images(self, paths: Mapping[str, Path]) -> None:
        """Do nothing: plots are files of their own."""

    def log_artifact(self, path: Path) -> None:
        """Do nothing: the adapter stays in its folder."""

    def hint(self) -> str | None:
        return None

    def finish(self, exit_code: int) -> None:
        if self._file is not None:
            self._write()
            self._sync()
            self._file.close()
            self._file = None

    def _write(self) -> None:
        assert self._file is not None
        while self._unwritten:
            written = self._file.write(self._unwritten)  # may be a part of it on a full disk
            self._unwritten = self._unwritten[written:]

    def _sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._last_sync = time.monotonic()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl: one row per step, in order; several rows of a step are merged.

    Damaged lines are skipped, such as the incomplete last line that a crash leaves behind.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in _lines(path):
        if row := _parse_row(line):
            rows.setdefault(row[GLOBAL_STEP], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a regular file, in parts of `_MAX_LINE_BYTES` if they are longer."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        while line := file.readline(_MAX_LINE_BYTES):
            yield line


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a complete line: numbers, and the step as an integer; otherwise None."""
    try:
        row = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get(GLOBAL_STEP)) is not int:
        return None
    return row if all(_is_number(value) for value in row.values()) else None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) < _TOO_LARGE)


def _finite(value: float) -> float | int | None:
    """Return a number of Python for one of numpy or torch; None if it is not finite."""
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def _truncate(path: Path, step: int) -> None:
    """Remove the rows after `step`, which the resumed run logs again; all rows if `step` is 0.

    Damaged lines are removed too, such as the incomplete last line of a killed process.
    """
    if not path.exists():
        return
    rows = [(line, _parse_row(line)) for line in _lines(path)] if step else []
    kept_content = b"".join(line for line, row in rows if row and row[GLOBAL_STEP] <= step)
    damaged = sum(row is None for line, row in rows[:-1])  # the last line may be incomplete
    if damaged:
        logger.warning("%s: %d damaged lines are removed", path, damaged)
    if len(kept_content) != path.stat().st_size:
        atomic_write(path, kept_content)
