"""metrics.jsonl: one JSON object per logged step, there even when everything else fails."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from hqqtrain.track.base import STEP

SYNC_SECONDS = 10.0
"""How often lines are forced to the disk; in between a crash of the machine may lose some."""


class JsonlTracker:
    """Appends to `path`; a resumed run goes on in the same file.

    Every line has `train/global_step` and `time` (seconds since 1970); a number that is not
    finite is null, for JSON knows no other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._synced = 0.0

    def start(self, config: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        assert self._file is not None
        row: dict[str, Any] = {STEP: step, "time": round(time.time(), 3)}
        row |= {name: _finite(value) for name, value in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._sync()

    def images(self, paths: Mapping[str, Path]) -> None:
        """Plots have files of their own."""

    def finish(self, exit_code: int) -> None:
        if self._file is not None:
            self._sync()
            self._file.close()
            self._file = None

    def _sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; a last line cut off by a crash is left out.

    Where a resumed run repeated steps, the later row of a step and name counts: rows of the
    same step are merged.
    """
    rows: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                row = json.loads(line)
                rows.setdefault(row[STEP], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def _finite(value: float) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def _drop_torn_line(path: Path) -> None:
    """Cuts what a killed process left after the last newline, so that appending stays valid."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
