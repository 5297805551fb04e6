"""Jobs as processes of their own, and the signals that go on to them.

A process of its own, because a job that fails, runs out of memory or leaves a process group
behind must not touch the next one. Each has a process group of its own as well, so that Ctrl-C,
which a terminal sends to a whole group, reaches a job once: a second signal means "at once".
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class ProcessPool:
    """Running processes, each known by a key. Use as a context manager, in the main thread."""

    def __init__(self, inherited: Sequence[int] = ()) -> None:
        self.inherited = inherited
        """Handles of open files that the processes are to hold as well."""
        self.signal: int | None = None
        """The last signal that came, and was passed on."""
        self._running: dict[int, tuple[subprocess.Popen, Any]] = {}
        self._before: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __enter__(self) -> "ProcessPool":
        heard = [s for s in FORWARDED if signal.getsignal(s) is not signal.SIG_IGN]  # nohup
        self._before = {number: signal.signal(number, self._pass_on) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if error:  # a fault of ours, such as a full disk: leave no job behind
            self._pass_on(signal.SIGTERM)
        while self._running:
            self.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(
        self, key: Any, command: Sequence[str], env: Mapping[str, str], log: Path | None
    ) -> None:
        """Starts `command`; its output goes to `log`, appended, or to where ours goes."""
        with ExitStack() as stack:
            output = stack.enter_context(log.open("ab")) if log else None
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT if log else None, process_group=0,
                pass_fds=self.inherited,
            )  # fmt: skip
        self._running[process.pid] = (process, key)
        if self.signal:  # it came while the process was being started
            self._send(process.pid, self.signal)

    def wait(self) -> tuple[Any, int]:
        """(key, exit code) of the next process that ends; negative: ended by that signal."""
        while True:
            pid, status = os.wait()
            if pid in self._running:  # else a child that whoever started us has left
                process, key = self._running.pop(pid)
                process.returncode = os.waitstatus_to_exitcode(status)
                return key, process.returncode

    def _pass_on(self, number: int, *_: object) -> None:
        self.signal = number
        for pid in list(self._running):
            self._send(pid, number)

    @staticmethod
    def _send(pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
