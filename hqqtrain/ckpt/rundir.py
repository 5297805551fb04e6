"""The directory of a run: locked by one process at a time, and only ever for one configuration.

Only rank 0 uses it. Nothing is written into a directory that contains files but no run.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import yaml

from hqqtrain.ckpt.atomic import atomic_write_json, without_nonfinite
from hqqtrain.ckpt.identity import read_yaml, refuse_another
from hqqtrain.ckpt.lock import check_seen, take_lock, token_of
from hqqtrain.ckpt.provenance import (
    MADE_FROM,
    git_revision,
    input_stamps,
    made_from,
    versions,
)  # fmt: skip
from hqqtrain.config import RunConfig, UserError
from hqqtrain.config.atomic import atomic_write
from hqqtrain.config.secrets import masked, masked_command

STATES = ("running", "done", "preempted", "failed")
"""Values of `status` in status.json."""
_LOCK = ".lock"


class RunDirectory:
    """`<run.root>/<run.name>/`: its lock, config.yaml, status.json, loading.json, summary.json.

    Use it as a context manager: entering takes the lock, leaving releases it. `begin` starts the
    run. If it was not called, leaving removes the new directory again.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.run.root).expanduser() / config.run_name()
        self._lock: IO[str] | None = None
        self._made: list[Path] = []

    def check(self) -> None:
        """Check that the directory is free or belongs to this configuration. Writes nothing.

        Raises:
            UserError: the directory belongs to another configuration, is damaged, or contains other
                files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; choose another run.name or run.root.")
        if (self.path / "config.yaml").is_file():
            refuse_another(self.path, self.config)
        elif self.path.is_dir() and _has_files(self.path):
            raise UserError(f"{self.path}: contains files, but no run; choose another run.name.")
        self.status()

    def token(self) -> str:
        """Return the lock's token, by which `check_shared` recognizes the directory."""
        return token_of(self.path / _LOCK)

    def check_shared(self, token: str) -> None:
        """Check that this machine sees the directory that rank 0 has locked.

        Args:
            token: The `token` on rank 0.

        Raises:
            UserError: this machine does not see it; the nodes do not share `run.root`.
        """
        check_seen(self.path / _LOCK, token, f"run.root={self.config.run.root}")

    def status(self) -> dict[str, Any]:
        """Read status.json; return an empty dict if it does not exist.

        Raises:
            UserError: the file is damaged.
        """
        return read_yaml(self.path / "status.json")

    def is_finished(self) -> bool:
        """Whether a run has finished here, whatever its values of the keys in `MAY_CHANGE`."""
        is_done = self.status().get("status") == "done"
        return is_done and (self.path / "summary.json").is_file()

    def done(self) -> bool:
        """Whether this run has finished with exactly this configuration.

        A run that finished with other values of keys in `MAY_CHANGE`, such as fewer steps, does not
        count.

        Raises:
            UserError: the run has finished, but its input files have changed since.
        """
        if not self.is_finished():
            return False
        if read_yaml(self.path / "config.yaml").get("identity") != self.config.identity():
            return False
        if read_yaml(self.path / "config.yaml").get("inputs") != input_stamps(self.config):
            raise UserError(
                f"{self.path}: has finished, but its input files have changed since; choose "
                "another run.name for the new files."
            )
        return True

    def holds(self, name: str) -> bool:
        """Whether the subfolder `name` contains a model that was made from the current source."""
        return read_yaml(self.path / name / MADE_FROM) == made_from(self.config)

    def __enter__(self) -> "RunDirectory":
        """Take the lock.

        Raises:
            UserError: another process holds the lock, `run.root` is not writable, or `check` fails.
        """
        self.check()
        # Remember which folders are new, to remove them again if no run begins.
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self._lock = take_lock(self.path / _LOCK)
        except OSError as error:
            raise UserError(
                f"run.root={self.config.run.root}: cannot be written to ({error}); choose another."
            ) from error
        if self._lock is None:
            raise UserError(
                f"{self.path}: in use by another process; wait for it, or choose another run.name."
            )
        try:
            self.check()  # again: another process may have written before we had the lock
        except UserError:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def begin(self, command: Sequence[str]) -> None:
        """Write config.yaml and the status `running`.

        config.yaml contains the resolved configuration, identity, input digests, command line, git
        revision and package versions.
        """
        resolved = masked(asdict(self.config)) | {
            "identity": self.config.identity(),
            "inputs": input_stamps(self.config),
            "command": masked_command(list(command)),
            "git_revision": git_revision(),
            "versions": versions(),
        }
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        if self.status():
            # A kill between the two files must not leave the new identity with an old `done`.
            self.write_status("running")
        atomic_write(self.path / "config.yaml", text)
        self.write_status("running")

    def write_status(self, status: str, *, exit_code: int | None = None, cause: str = "") -> None:
        """Write status.json: one of `STATES`, the exit code if the run has ended, and the cause."""
        assert status in STATES, status
        assert self._lock is not None, "the run directory is not locked"
        facts = {
            "status": status,
            "exit_code": exit_code,
            "cause": masked(cause),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        atomic_write_json(self.path / "status.json", facts)

    def write_loading(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Write loading.json: the time and memory that loading took, per rank."""
        atomic_write_json(self.path / "loading.json", {"ranks": ranks})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json. NaN and infinity, which JSON does not have, become null."""
        assert self._lock is not None, "the run directory is not locked"
        atomic_write_json(self.path / "summary.json", without_nonfinite(summary))

    def _release(self) -> None:
        assert self._lock is not None
        if not (self.path / "config.yaml").exists():
            (self.path / _LOCK).unlink(missing_ok=True)
            for folder in self._made:
                _remove_if_empty(folder)
        self._lock.close()
        self._lock = None


def _has_files(folder: Path) -> bool:
    """Whether `folder` contains more than the hidden files that a killed attempt leaves."""
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
