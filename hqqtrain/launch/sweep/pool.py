"""Run jobs as separate processes and forward signals to them.

Every job has its own process, because a job that fails, runs out of memory or leaves a torch
process group behind must not affect the next one. Every job also has its own Unix process group.
A terminal sends Ctrl-C to a whole group, so a job in our group would receive it twice, from the
terminal and from us: the second time while it reacts to the first.
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from hqqtrain.common.files import open_for_append

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class ProcessPool:
    """Running processes, each known by a key. Use as a context manager, in the main thread."""

    def __init__(self, inherited_fds: Sequence[int] = ()) -> None:
        self.inherited_fds = inherited_fds
        """File descriptors that the processes inherit."""
        self.received_signal: int | None = None
        """The last signal that was received and forwarded."""
        self._running: dict[int, tuple[subprocess.Popen, Any]] = {}
        self._previous_handlers: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __enter__(self) -> "ProcessPool":
        # A signal that is ignored, such as SIGHUP under nohup, stays ignored.
        for number in FORWARDED_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._forward)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error:  # the sweep itself failed, for example because the disk is full: leave no job
            self._forward(signal.SIGTERM)
        while self._running:
            self.wait()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def start(
        self, key: Any, command: Sequence[str], env: Mapping[str, str], log: Path | None
    ) -> None:
        """Start `command`, known by `key`.

        Args:
            key: What `wait` returns when the process has ended.
            command: The program and its arguments.
            env: Its environment variables.
            log: The file to which its output is appended. None: our own standard output and error.
        """
        with ExitStack() as stack:
            output = stack.enter_context(open(open_for_append(log), "ab")) if log else None
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
                process_group=0,
                pass_fds=self.inherited_fds,
            )
        self._running[process.pid] = (process, key)
        # `_forward` did not reach this process if the signal arrived before it was registered. A
        # signal that arrives right here is sent twice; jobs treat that as one request.
        if self.received_signal:
            self._send(process.pid, self.received_signal)

    def wait(self) -> tuple[Any, int]:
        """Wait until a process ends.

        Returns:
            Its key and its exit code. A negative exit code is the number of the signal that
            killed the process.
        """
        while True:
            pid, status = os.wait()
            # `pid` may also be a child from before this process called exec, which keeps children.
            if pid in self._running:
                process, key = self._running.pop(pid)
                process.returncode = os.waitstatus_to_exitcode(status)
                return key, process.returncode

    def _forward(self, number: int, *_: object) -> None:
        self.received_signal = number
        for pid in list(self._running):
            self._send(pid, number)

    @staticmethod
    def _send(pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
