"""One directory per run, owned by one process at a time, never mixing two configurations.

Only the first rank uses it. Nothing is written into a directory that something else made.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.common.filelock import check_shared_lock, lock_token, take_lock
from hqqtrain.common.files import atomic_write, atomic_write_json, without_nonfinite
from hqqtrain.common.secrets import mask_command, mask_secrets
from hqqtrain.config.run import RunConfig
from hqqtrain.rundir.identity import check_same_config, read_yaml
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.provenance import (
    MADE_FROM,
    git_revision,
    input_digests,
    package_versions,
    source_digest,
)
from hqqtrain.rundir.schema import STATES, Status


class RunDirectory:
    """`<run.root>/<run.name>/`: its lock, config.yaml, status.json, loading.json, summary.json.

    Use as a context manager: entering takes the lock, `begin` writes, leaving frees the lock.
    A directory in which nothing was begun is removed again.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.layout = RunLayout(Path(config.run.root).expanduser() / config.run_name())
        self.path = self.layout.folder
        self._lock: IO[str] | None = None
        self._made: list[Path] = []

    def check(self) -> None:
        """Raises UserError where it is another configuration's, or damaged. Writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; choose another run.name or run.root.")
        if (self.layout.config_yaml).is_file():
            check_same_config(self.path, self.config)
        elif self.path.is_dir() and _holds_files(self.path):
            raise UserError(f"{self.path}: holds files, but no run; choose another run.name.")
        self.status()

    def token(self) -> str:
        """What shows that somebody sees this very directory, for `check_shared`."""
        return lock_token(self.layout.lock)

    def check_shared(self, token: str) -> None:
        """Raises UserError where this machine does not see what the first rank's has written."""
        check_shared_lock(self.layout.lock, token, f"run.root={self.config.run.root}")

    def status(self) -> Status:
        """What status.json says; empty where there is none. Raises UserError for a damaged one."""
        return Status.from_json(read_yaml(self.layout.status_json))

    def is_finished(self) -> bool:
        """Whether a run has been finished here, with whatever may change."""
        is_done = self.status().status == "done"
        return is_done and (self.layout.summary_json).is_file()

    def done(self) -> bool:
        """Whether this very run is finished: status.json says so, summary.json is there.

        One that was finished with other MAY_CHANGE, as fewer steps, is not. Raises UserError where
        it was made from files that have changed since.
        """
        if not self.is_finished():
            return False
        if read_yaml(self.layout.config_yaml).get("identity") != self.config.identity():
            return False
        if read_yaml(self.layout.config_yaml).get("inputs") != input_digests(self.config):
            raise UserError(
                f"{self.path}: is done, but made from files that have changed since; choose "
                "another run.name for the new ones."
            )
        return True

    def holds(self, name: str) -> bool:
        """Whether the model in the folder `name` is there, of the source that is there now."""
        return read_yaml(self.path / name / MADE_FROM) == source_digest(self.config)

    def __enter__(self) -> "RunDirectory":
        """Take the lock. Raises UserError while another process holds it, or as `check` does."""
        self.check()
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self._lock = take_lock(self.layout.lock)
        except OSError as error:
            raise UserError(
                f"run.root={self.config.run.root}: cannot be written to ({error}); choose another."
            ) from error
        if self._lock is None:
            raise UserError(
                f"{self.path}: in use by another process; wait for it, or choose another run.name."
            )
        try:
            self.check()
        except UserError:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def begin(self, command: Sequence[str]) -> None:
        """Write config.yaml (resolved, versions, git revision, command) and status `running`."""
        resolved = mask_secrets(asdict(self.config)) | {
            "identity": self.config.identity(),
            "inputs": input_digests(self.config),
            "command": mask_command(list(command)),
            "git_revision": git_revision(),
            "versions": package_versions(),
        }
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        if self.status().status:
            self.write_status("running")  # else a kill here leaves the new identity, and `done`
        atomic_write(self.layout.config_yaml, text)
        self.write_status("running")

    def write_status(self, status: str, *, exit_code: int | None = None, cause: str = "") -> None:
        """Write status.json: one of STATES, the exit code where it has ended, and why."""
        assert status in STATES, status
        assert self._lock is not None, "the run directory is not locked"
        facts = Status(
            status=status,
            exit_code=exit_code,
            cause=mask_secrets(cause),
            pid=os.getpid(),
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        atomic_write_json(self.layout.status_json, facts.to_json())

    def write_loading(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Write loading.json: what loading the model took, rank by rank."""
        atomic_write_json(self.layout.loading_json, {"ranks": ranks})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json; figures that are not finite, which JSON lacks, become null."""
        assert self._lock is not None, "the run directory is not locked"
        atomic_write_json(self.layout.summary_json, without_nonfinite(summary))

    def _release(self) -> None:
        assert self._lock is not None
        if not (self.layout.config_yaml).exists():
            (self.layout.lock).unlink(missing_ok=True)
            for folder in self._made:
                _remove_if_empty(folder)
        self._lock.close()
        self._lock = None


def _holds_files(folder: Path) -> bool:
    """Whether `folder` holds more than what an attempt that was killed leaves behind."""
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
