"""Runs the jobs of a sweep, some at a time, and goes on where an earlier attempt was killed.

One failure does not end the sweep. A preemption does: of a job, or of us, whose signal goes on
to all that run.
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
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.common.exit_codes import DONE, FAILED, PREEMPTED, USER_ERROR
from hqqtrain.common.secrets import mask_command
from hqqtrain.compose.job import Job
from hqqtrain.launch.sweep.pool import ProcessPool
from hqqtrain.launch.sweep.report import make_folder, print_table, write_files
from hqqtrain.launch.sweep.resources import partition_devices
from hqqtrain.launch.sweep.results import JobResults
from hqqtrain.launch.sweep.sweep import Sweep

LAUNCHER = "HQQTRAIN_LAUNCHER"
"""Set by launch.sh to itself, so that each job gets all of its GPUs."""


def run_all(planned: Sequence[Job]) -> int:
    """Runs every job that is not done yet. Prints the table at the end, and who failed.

    Returns 0 if all are done, 3 if one was preempted or could not be started any more, else 1.
    """
    sweep = Sweep.of(planned)
    shares = partition_devices(sweep.at_a_time, os.environ)
    make_folder(sweep)
    for job in sweep.same:
        _say(f"sweep: {sweep.label(job)}: the same run as another of these jobs, and left out")
    waits = f"sweep: waiting: jobs of an earlier attempt still run, in {sweep.folder}"
    with hold_lock(sweep, lambda: _say(waits)) as lock:
        return _Runner(sweep, shares, lock).run()


def show_table(planned: Sequence[Job]) -> int:
    """Writes and prints the table and the plots from what the jobs have left so far."""
    sweep = Sweep.of(planned)
    make_folder(sweep)
    print_table(sweep)
    return DONE


@dataclass
class _Task:
    """A job's turn."""

    job: Job
    title: str
    share: dict[str, str] = field(default_factory=dict)
    began: float = 0.0


class _Runner:
    """`shares`: the environment of each of the jobs that run at a time; `lock`: see `hold_lock`."""

    def __init__(self, sweep: Sweep, shares: list[dict[str, str]], lock: int) -> None:
        self.sweep, self.shares, self.lock = sweep, shares, lock
        self.alone = len(shares) == 1
        self.outcomes = JobResults(sweep)
        self.failed: list[Job] = []
        self.preempted = False
        self.waiting: list[_Task] = []

    def run(self) -> int:
        for number, job in enumerate(self.sweep.jobs, 1):
            title = f"sweep {number}/{len(self.sweep.jobs)}: {self.sweep.label(job)}"
            self._look_at(_Task(job, title))
        with ProcessPool([self.lock]) as pool:
            while self._may_start(pool) or len(pool):
                while self._may_start(pool) and self.shares:
                    self._start(pool, self.waiting.pop(0))
                if len(pool):  # else a signal came just now
                    self._ended(*pool.wait(), pool.signal)
        fault = self._tell()
        self._name_failed()
        return self._code() or fault

    def _look_at(self, task: _Task) -> None:
        """Leaves out what is done; refuses what is, but of other inputs than there are now."""
        try:
            if not task.job.is_done():
                self.waiting.append(task)
                return
            _say(f"{task.title}: done before{task.job.figures()}")
            self._note(task.job, DONE)
        except UserError as error:
            print(f"hqqtrain: {error}", file=sys.stderr, flush=True)
            self._note(task.job, USER_ERROR)

    def _may_start(self, pool: ProcessPool) -> bool:
        return bool(self.waiting) and not self.preempted and pool.signal is None

    def _start(self, pool: ProcessPool, task: _Task) -> None:
        task.share, task.began = self.shares.pop(), time.monotonic()
        log = None if self.alone else self._new_log(task.job)
        _say(task.title if log is None else f"{task.title}: started, see {log}")
        launcher = os.environ.get(LAUNCHER)
        program = [launcher] if launcher else [sys.executable, "-m", "hqqtrain"]
        pool.start(task, [*program, *task.job.command], {**os.environ, **task.share}, log)

    def _ended(self, task: _Task, code: int, number: int | None) -> None:
        """`number`, if any, is a signal that was passed on: whom it ended at once was preempted."""
        self.shares.append(task.share)
        if number is not None and code in _ended_by(number):
            code = PREEMPTED
        seconds = time.monotonic() - task.began
        _say(f"{task.title}: {_result(task.job, code)} ({seconds:.0f} s)")
        self._note(task.job, code)
        self._write_files()

    def _note(self, job: Job, code: int) -> None:
        self.preempted |= code == PREEMPTED
        if code not in (DONE, PREEMPTED):
            self.failed.append(job)
        self.outcomes.record(job, code)

    def _new_log(self, job: Job) -> Path:
        """Its log, which begins with the whole command."""
        log = self.sweep.log(job)
        with log.open("a") as file:
            file.write(f"$ python -m hqqtrain {shlex.join(mask_command(job.command))}\n")
        return log

    def _tell(self) -> int:
        """Prints and writes the table for the last time; the exit code of a fault in that."""
        try:
            print_table(self.sweep, self.outcomes)
            self.outcomes.save()
        except (UserError, OSError) as error:
            print(f"hqqtrain: {error}", file=sys.stderr, flush=True)
            return USER_ERROR
        return DONE

    def _write_files(self) -> None:
        """A table that fails is no reason to leave jobs undone."""
        try:
            self.outcomes.save()
            write_files(self.sweep, self.outcomes)
        except Exception as error:
            print(f"warning: {self.sweep.folder} was not written: {error!r}", file=sys.stderr)

    def _name_failed(self) -> None:
        for job in self.failed:
            place = job.folder if self.alone else self.sweep.log(job)
            where = place if place.exists() else "above"
            print(f"hqqtrain: failed: {self.sweep.label(job)}; see {where}", file=sys.stderr)

    def _code(self) -> int:
        if self.preempted:
            return PREEMPTED
        if self.failed:
            return FAILED
        return PREEMPTED if self.waiting else DONE


def _ended_by(number: int) -> tuple[int, ...]:
    """Exit codes of a process that the signal has ended; after Ctrl-C our own programs say 1."""
    return (-number, 128 + number, *([FAILED] if number == signal.SIGINT else []))


def _result(job: Job, code: int) -> str:
    if code == DONE:
        return f"done{job.figures()}"
    return "preempted" if code == PREEMPTED else f"failed with exit code {code}"


def _say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def hold_lock(sweep: Sweep, on_wait: Callable[[], None]) -> Iterator[int]:
    """Holds the sweep's folder, after waiting for whoever has it; yields the lock's handle.

    Jobs inherit the handle: as long as one runs the lock is held, even where we are gone.
    `on_wait` is called where there is something to wait for.
    """
    with (sweep.folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
