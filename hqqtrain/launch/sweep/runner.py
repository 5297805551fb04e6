"""Run the jobs of a sweep, several in parallel, and resume a sweep that was killed.

If a job fails, the sweep continues with the next one. If a job is preempted, no further job is
started. If the sweep itself receives a signal, it forwards the signal to all running jobs, and no
further job is started.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hqqtrain.common.errors import DONE, FAILED, PREEMPTED, USER_ERROR, UserError, error_line
from hqqtrain.common.files import open_for_append
from hqqtrain.common.secrets import mask_command
from hqqtrain.compose.job import Job
from hqqtrain.launch.sweep.lock import hold_lock
from hqqtrain.launch.sweep.pool import ProcessPool
from hqqtrain.launch.sweep.report import create_sweep_folder, print_sweep_table, write_sweep_report
from hqqtrain.launch.sweep.resources import partition_devices
from hqqtrain.launch.sweep.results import JobResults
from hqqtrain.launch.sweep.sweep import Sweep

LAUNCHER_VARIABLE = "HQQTRAIN_LAUNCHER"
"""launch.sh sets this environment variable to its own path.

Every job is then started with launch.sh and uses all GPUs that the sweep gives it.
"""


def run_sweep(jobs: Sequence[Job]) -> int:
    """Run every job that is not done yet, then print the table and the jobs that failed.

    Returns:
        The exit code. The first condition that holds decides: 3 if a job was preempted, 1 if one
        failed, 3 if a signal kept one from being started, 2 if the table could not be written, and
        0 otherwise.

    Raises:
        UserError: the machine has too few GPUs, or the sweep's folder cannot be created.
    """
    sweep = Sweep.from_jobs(jobs)
    device_envs = partition_devices(sweep.num_parallel_jobs, os.environ)
    create_sweep_folder(sweep)
    for job in sweep.duplicates:
        _print(f"sweep: {sweep.label(job)}: skipped, because another job is the same run")
    waiting = (
        f"sweep: waiting for the jobs of an earlier attempt, which still run in {sweep.folder}"
    )
    with hold_lock(sweep, lambda: _print(waiting)) as lock_fd:
        return _Runner(sweep, device_envs, lock_fd).run()


def show_sweep_table(jobs: Sequence[Job]) -> int:
    """Write and print the table and the plots from the jobs' results so far.

    Raises:
        UserError: the sweep's folder or its files cannot be written.
    """
    sweep = Sweep.from_jobs(jobs)
    create_sweep_folder(sweep)
    print_sweep_table(sweep)
    return DONE


@dataclass
class _QueueEntry:
    """A job that is waiting or running."""

    job: Job
    title: str
    """Begins the lines that are printed about the job: `sweep 1/3: quant.nbits=2`."""
    device_env: dict[str, str] = field(default_factory=dict)
    """The environment variables that give the job its part of the machine."""
    started: float = 0.0
    """Start time on the monotonic clock, in seconds."""


class _Runner:
    """Runs the jobs of a sweep that are not done.

    Args:
        sweep: the jobs.
        device_envs: one set of environment variables for each job that runs in parallel.
        lock_fd: the file descriptor that the jobs inherit, see `hold_lock`.
    """

    def __init__(self, sweep: Sweep, device_envs: list[dict[str, str]], lock_fd: int) -> None:
        self.sweep, self.free_device_envs, self.lock_fd = sweep, device_envs, lock_fd
        self.is_sequential = len(device_envs) == 1
        self.results = JobResults(sweep)
        self.failed: list[Job] = []
        self.preempted = False
        self.queue: list[_QueueEntry] = []

    def run(self) -> int:
        """Run the sweep and return its exit code."""
        for number, job in enumerate(self.sweep.jobs, 1):
            title = f"sweep {number}/{len(self.sweep.jobs)}: {self.sweep.label(job)}"
            self._queue_unless_done(_QueueEntry(job, title))
        with ProcessPool([self.lock_fd]) as pool:
            while self._may_start(pool) or len(pool):
                while self._may_start(pool) and self.free_device_envs:
                    self._start(pool, self.queue.pop(0))
                self._write_report()
                # The pool is empty if a signal arrived before the first job was started.
                if len(pool):
                    entry, code = pool.wait()
                    # Read the signal after the wait, because it may arrive meanwhile.
                    self._on_end(entry, code, pool.received_signal)
        table_code = self._write_final_table()
        for job in self.failed:
            output = job.folder if self.is_sequential else self.sweep.log_file(job)
            where = output if output.exists() else "the messages above"
            message = f"{self.sweep.label(job)}: failed; see {where}"
            print(error_line(message), file=sys.stderr)
        return self._exit_code_of_jobs() or table_code

    def _queue_unless_done(self, entry: _QueueEntry) -> None:
        """Queue the job unless it is done. Record a failure if its inputs have changed since."""
        try:
            if not entry.job.is_done():
                self.results.forget_start(entry.job)
                self.queue.append(entry)
                return
            _print(f"{entry.title}: done before{entry.job.format_metrics()}")
            self._record(entry.job, DONE)
        except UserError as error:
            print(error_line(error), file=sys.stderr, flush=True)
            self._record(entry.job, USER_ERROR)

    def _may_start(self, pool: ProcessPool) -> bool:
        return bool(self.queue) and not self.preempted and pool.received_signal is None

    def _start(self, pool: ProcessPool, entry: _QueueEntry) -> None:
        """Start a job. It prints to our own output, or to its log if several run in parallel."""
        entry.device_env, entry.started = self.free_device_envs.pop(), time.monotonic()
        if self.is_sequential:
            log = None
            _print(entry.title)
        else:
            log = self.sweep.log_file(entry.job)
            with open(open_for_append(log), "a") as file:
                file.write(
                    f"$ python -m hqqtrain {shlex.join(mask_command(entry.job.arguments))}\n"
                )
            _print(f"{entry.title}: started, see {log}")
        launcher = os.environ.get(LAUNCHER_VARIABLE)
        program = [launcher] if launcher else [sys.executable, "-m", "hqqtrain"]
        pool.start(entry, [*program, *entry.job.arguments], {**os.environ, **entry.device_env}, log)
        self.results.record(entry.job, None)

    def _on_end(self, entry: _QueueEntry, code: int, forwarded_signal: int | None) -> None:
        """Record how a job ended.

        Args:
            entry: the job that ended.
            code: its exit code.
            forwarded_signal: the signal that was forwarded to it, if any. A job that the signal
                killed counts as preempted, not as failed.
        """
        self.free_device_envs.append(entry.device_env)
        if forwarded_signal is not None and code in _exit_codes_of_signal(forwarded_signal):
            code = PREEMPTED
        if code == DONE:
            result = f"done{entry.job.format_metrics()}"
        else:
            result = "preempted" if code == PREEMPTED else f"failed with exit code {code}"
        _print(f"{entry.title}: {result} ({time.monotonic() - entry.started:.0f} s)")
        self._record(entry.job, code)

    def _write_report(self) -> None:
        """Write the sweep's files. If that fails, the jobs still run."""
        try:
            self.results.save()
            write_sweep_report(self.sweep, self.results)
        except Exception as error:
            print(
                f"warning: the report in {self.sweep.folder} was not written: {error!r}",
                file=sys.stderr,
            )

    def _record(self, job: Job, code: int) -> None:
        """Remember how the job ended, for the exit code and the table."""
        self.preempted |= code == PREEMPTED
        if code not in (DONE, PREEMPTED):
            self.failed.append(job)
        self.results.record(job, code)

    def _write_final_table(self) -> int:
        """Print and write the table for the last time. Return the exit code: 2 if that fails."""
        try:
            print_sweep_table(self.sweep, self.results)
            self.results.save()
        except (UserError, OSError) as error:
            print(error_line(error), file=sys.stderr, flush=True)
            return USER_ERROR
        return DONE

    def _exit_code_of_jobs(self) -> int:
        if self.preempted:
            return PREEMPTED
        if self.failed:
            return FAILED
        # A job is left in the queue only if a signal kept it from being started.
        return PREEMPTED if self.queue else DONE


def _exit_codes_of_signal(number: int) -> tuple[int, ...]:
    """Return the exit codes of a job that may mean that signal `number` ended it.

    Python reports `-number` and a shell reports `128 + number`. hqqtrain itself returns 1 after
    Ctrl-C.
    """
    return (-number, 128 + number, *([FAILED] if number == signal.SIGINT else []))


def _print(text: str) -> None:
    """Print at once, so that our lines and the output of the jobs stay in order."""
    print(text, flush=True)
