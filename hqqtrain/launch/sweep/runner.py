"""Runs the jobs of a sweep, several in parallel, and resumes a sweep that was killed.

A failed job does not end the sweep. A preemption does, whether one job was preempted or the sweep
itself: a signal to the sweep is forwarded to all running jobs.
"""

import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from hqqtrain.common.errors import DONE, FAILED, PREEMPTED, USER_ERROR, UserError
from hqqtrain.common.secrets import mask_command
from hqqtrain.compose.job import Job
from hqqtrain.launch.sweep.pool import ProcessPool
from hqqtrain.launch.sweep.report import create_sweep_folder, print_sweep_table, write_sweep_report
from hqqtrain.launch.sweep.resources import partition_devices
from hqqtrain.launch.sweep.results import JobResults
from hqqtrain.launch.sweep.sweep import Sweep

LAUNCHER = "HQQTRAIN_LAUNCHER"
"""launch.sh sets it to its own path, so that every job starts through it and uses all its GPUs."""


def run_sweep(jobs: Sequence[Job]) -> int:
    """Run every job that is not done yet, then print the table and the jobs that failed.

    Returns:
        The exit code: 0 if all jobs are done, 3 if one was preempted or could no longer be
        started, 1 if one failed, and 2 if only the table could not be written.

    Raises:
        UserError: the machine has too few GPUs, or the sweep's folder cannot be created.
    """
    sweep = Sweep.from_jobs(jobs)
    device_envs = partition_devices(sweep.num_parallel_jobs, os.environ)
    create_sweep_folder(sweep)
    for job in sweep.duplicates:
        _print(f"sweep: {sweep.label(job)}: the same run as another of these jobs; skipped")
    waiting = f"sweep: waiting: jobs of an earlier attempt still run in {sweep.folder}"
    with hold_lock(sweep, lambda: _print(waiting)) as lock:
        return _Runner(sweep, device_envs, lock).run()


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
class _Task:
    """A job in the queue, and what the runner knows of it while it runs."""

    job: Job
    title: str
    device_env: dict[str, str] = field(default_factory=dict)
    """The environment variables that give the job its part of the machine."""
    started: float = 0.0
    """Start time on the monotonic clock, in seconds."""


class _Runner:
    """Runs the jobs of a sweep that are not done.

    Args:
        sweep: the jobs.
        device_envs: one set of environment variables for each job that runs in parallel.
        lock: the file descriptor that the jobs inherit, see `hold_lock`.
    """

    def __init__(self, sweep: Sweep, device_envs: list[dict[str, str]], lock: int) -> None:
        self.sweep, self.free_device_envs, self.lock = sweep, device_envs, lock
        self.is_sequential = len(device_envs) == 1
        self.results = JobResults(sweep)
        self.failed: list[Job] = []
        self.preempted = False
        self.queue: list[_Task] = []

    def run(self) -> int:
        """Run the sweep and return its exit code."""
        for number, job in enumerate(self.sweep.jobs, 1):
            title = f"sweep {number}/{len(self.sweep.jobs)}: {self.sweep.label(job)}"
            self._queue_unless_done(_Task(job, title))
        with ProcessPool([self.lock]) as pool:
            while self._may_start(pool) or len(pool):
                while self._may_start(pool) and self.free_device_envs:
                    self._start(pool, self.queue.pop(0))
                # The pool is empty if a signal arrived before the first job was started.
                if len(pool):
                    self._on_end(*pool.wait(), pool.received_signal)
        table_code = self._write_final_table()
        for job in self.failed:
            place = job.folder if self.is_sequential else self.sweep.log_file(job)
            where = place if place.exists() else "above"
            print(f"hqqtrain: failed: {self.sweep.label(job)}; see {where}", file=sys.stderr)
        return self._exit_code() or table_code

    def _queue_unless_done(self, task: _Task) -> None:
        """Queue the job unless it is done. Fail it if it is done but its inputs have changed."""
        try:
            if not task.job.is_done():
                self.queue.append(task)
                return
            _print(f"{task.title}: done before{task.job.format_figures()}")
            self._record(task.job, DONE)
        except UserError as error:
            print(f"hqqtrain: {error}", file=sys.stderr, flush=True)
            self._record(task.job, USER_ERROR)

    def _may_start(self, pool: ProcessPool) -> bool:
        return bool(self.queue) and not self.preempted and pool.received_signal is None

    def _start(self, pool: ProcessPool, task: _Task) -> None:
        task.device_env, task.started = self.free_device_envs.pop(), time.monotonic()
        if self.is_sequential:
            log = None
            _print(task.title)
        else:
            log = self.sweep.log_file(task.job)
            with log.open("a") as file:
                file.write(f"$ python -m hqqtrain {shlex.join(mask_command(task.job.arguments))}\n")
            _print(f"{task.title}: started, see {log}")
        launcher = os.environ.get(LAUNCHER)
        program = [launcher] if launcher else [sys.executable, "-m", "hqqtrain"]
        pool.start(task, [*program, *task.job.arguments], {**os.environ, **task.device_env}, log)

    def _on_end(self, task: _Task, code: int, forwarded: int | None) -> None:
        """Record how a job ended, and write the sweep's files.

        Args:
            task: the job.
            code: its exit code.
            forwarded: the signal that was forwarded to it, if any. A job that the signal killed
                counts as preempted, not as failed.
        """
        self.free_device_envs.append(task.device_env)
        if forwarded is not None and code in _exit_codes_of_signal(forwarded):
            code = PREEMPTED
        if code == DONE:
            result = f"done{task.job.format_figures()}"
        else:
            result = "preempted" if code == PREEMPTED else f"failed with exit code {code}"
        _print(f"{task.title}: {result} ({time.monotonic() - task.started:.0f} s)")
        self._record(task.job, code)
        # A table that cannot be written is no reason to stop: the other jobs still run.
        try:
            self.results.save()
            write_sweep_report(self.sweep, self.results)
        except Exception as error:
            print(f"warning: {self.sweep.folder} was not written: {error!r}", file=sys.stderr)

    def _record(self, job: Job, code: int) -> None:
        self.preempted |= code == PREEMPTED
        if code not in (DONE, PREEMPTED):
            self.failed.append(job)
        self.results.record(job, code)

    def _write_final_table(self) -> int:
        """Print and write the table for the last time, and return 2 if that fails, else 0."""
        try:
            print_sweep_table(self.sweep, self.results)
            self.results.save()
        except (UserError, OSError) as error:
            print(f"hqqtrain: {error}", file=sys.stderr, flush=True)
            return USER_ERROR
        return DONE

    def _exit_code(self) -> int:
        if self.preempted:
            return PREEMPTED
        if self.failed:
            return FAILED
        return PREEMPTED if self.queue else DONE


def _exit_codes_of_signal(number: int) -> tuple[int, ...]:
    """Exit codes of a process that signal `number` killed.

    Python reports `-number` and a shell reports `128 + number`. hqqtrain itself returns 1 after
    Ctrl-C.
    """
    return (-number, 128 + number, *([FAILED] if number == signal.SIGINT else []))


def _print(text: str) -> None:
    """Print at once, so that our lines and the output of the jobs stay in order."""
    print(text, flush=True)


@contextmanager
def hold_lock(sweep: Sweep, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold an exclusive lock on the sweep's folder, waiting until it is free.

    Jobs inherit the lock's file descriptor, so the lock stays held as long as any job runs, even
    if the process of the sweep itself is gone.

    Args:
        sweep: the sweep whose folder is locked.
        on_wait: called once if another attempt holds the lock.

    Yields:
        The file descriptor of the lock.
    """
    with (sweep.folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
