"""Rewrite report/ during a run.

Plots take a second of Python, during which a training step would wait. So another process with low
priority draws them, which a thread starts from time to time. It reads the files of the run, and
gets the summary so far from its standard input.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hqqtrain.report.run_report import LIVE_SECONDS

logger = logging.getLogger(__name__)

FIRST_SECONDS = 20
"""Seconds until the first report. A shorter run has only the report at its end."""


KILL_SECONDS = 10
"""Longest wait for the end of the process, which a file system that hangs may delay."""


class LiveReport:
    """Writes the report of a run that is not over. Use it on the main process only.

    Args:
        run_dir: The run directory.
        summary: Returns the content of summary.json so far; called on another thread.
    """

    def __init__(self, run_dir: Path, summary: Callable[[], Mapping[str, Any]]) -> None:
        self._run_dir, self._summary = run_dir.absolute(), summary
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="live report", daemon=True)

    def start(self) -> None:
        """Write the report from time to time, until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Write no further report, so that the caller can write the last one."""
        self._stopped.set()
        with self._lock:
            if self._child:
                self._child.kill()
        if self._thread.is_alive():
            self._thread.join(KILL_SECONDS)

    def _run(self) -> None:
        seconds = FIRST_SECONDS
        while not self._stopped.wait(seconds):
            try:
                self._write()
            except Exception as error:  # such as no memory for another process
                logger.warning("report/ is not written during the run: %s", error)
                return
            seconds = LIVE_SECONDS

    def _write(self) -> None:
        """Start the process that writes the report, and wait for its end or for `stop`."""
        summary = json.dumps(self._summary()).encode()
        with self._lock:
            if self._stopped.is_set():
                return
            # It finds the same packages as this process: `-P` leaves out the current folder, unless
            # it is in our own path. In its own session, it does not get the terminal's Ctrl-C.
            path = os.pathsep.join(map(os.path.abspath, sys.path))
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "hqqtrain.report", str(self._run_dir)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        _, errors = self._child.communicate(summary)
        code, self._child = self._child.returncode, None
        if code and not self._stopped.is_set():
            lines = errors.decode(errors="replace").strip().splitlines() or [f"exit code {code}"]
            raise RuntimeError(lines[-1])
