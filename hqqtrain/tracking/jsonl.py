"""metrics.jsonl: one JSON object per logged step, there even when everything else fails."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from hqqtrain.common.files import atomic_write
from hqqtrain.rundir.schema import GLOBAL_STEP

logger = logging.getLogger(__name__)

SYNC_SECONDS = 10.0
"""How often lines are forced to the disk; in between a crash of the machine may lose some."""


class JsonlTracker:
    """Appends to `path`; a resumed run goes on in the same file, after the step it resumes from.

    Every line has `train/global_step` and `time` (seconds since 1970); a number that is not
    finite is null, for JSON knows no other. Lines that a full disk does not take are kept, and
    written when there is room again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._waiting = b""
        self._synced = 0.0

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut(self.path, step)
        self._file = self.path.open("ab", buffering=0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        row: dict[str, Any] = {GLOBAL_STEP: step, "time": round(time.time(), 3)}
        row |= {name: _finite(value) for name, value in metrics.items()}
        could = not self._waiting
        self._waiting += (json.dumps(row) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if could:
                logger.warning("%s: cannot be written for now: %s", self.path, error)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._sync()

    def images(self, paths: Mapping[str, Path]) -> None:
        """Plots have files of their own."""

    def artifact(self, path: Path) -> None:
        """The adapter stays where it is."""

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
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order, those of a step merged into one.

    A last line that a crash has cut off is left out.
    """
    rows: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                row = json.loads(line)
                rows.setdefault(row[GLOBAL_STEP], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def _finite(value: float) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def _cut(path: Path, step: int) -> None:
    """Leaves the rows up to `step`, none of a run that begins: the others are written again.

    With them goes what is no row: the torn last line of a process that was killed.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True) if step else []
    kept = b"".join(line for line in lines if _step_of(line) <= step)
    if kept != content:
        atomic_write(path, kept)


def _step_of(line: bytes) -> float:
    """The step of a whole row; infinity, which is after every step, of anything else."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        row = None
    return row.get(GLOBAL_STEP, math.inf) if isinstance(row, dict) else math.inf
