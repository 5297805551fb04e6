"""The directory of a run. One process at a time holds its lock, and it has one configuration.

Only rank 0 writes to it. Nothing is written into a directory that contains files but no run.
"""

import errno
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import yaml

from hqqtrain.common.env import get_slurm_job_id
from hqqtrain.common.errors import UserError
from hqqtrain.common.filelock import check_shared_lock, read_lock_token, try_lock
from hqqtrain.common.files import atomic_write, atomic_write_json, check_owner, without_nonfinite
from hqqtrain.common.secrets import mask_command, mask_secrets
from hqqtrain.config.run import RunConfig
from hqqtrain.rundir.identity import (
    changed_inputs,
    check_same_config,
    git_revision,
    input_digests,
    is_made_from,
    package_versions,
)
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.results import (
    check_results,
    missing_results,
    result_digests,
    result_sizes,
)
from hqqtrain.rundir.schema import STATES, Status
from hqqtrain.rundir.yaml_file import read_yaml

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT = 180.0
"""Seconds that a job waits for the lock of its own earlier start.

Slurm requeues the job of a silent node. A shared file system releases the locks of a dead node only
after a lease, of 90 seconds with NFS; and a node that is only slow still has to end its processes.
"""

_POLL_SECONDS = 1.0


class RunDirectory:
    """`<run.root>/<run.name>/`: its lock, config.yaml, status.json, loading.json, summary.json.

    Use it as a context manager: entering takes the lock, leaving releases it. `begin` starts the
    run. If it was not called, leaving removes the new directory again.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.layout = RunLayout(Path(config.run.root).expanduser() / config.run_name())
        self.path = self.layout.folder
        self._lock: IO[str] | None = None
        self._new_folders: list[Path] = []

    def check(self) -> None:
        """Check that the directory is free or belongs to this configuration. Writes nothing.

        Raises:
            UserError: the directory belongs to another configuration, is damaged, contains other
                files, or contains links through which the run would write elsewhere.
        """
        try:
            is_there = self.path.exists()
            if not is_there:
                self._check_creatable()
        except OSError as error:  # such as a path that is too long
            raise self._unusable_error(error) from error
        if is_there and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; choose another run.name or run.root.")
        check_owner(self.path, f"run.name={self.path.name}")
        for path in self.layout.written_in_place():
            if path.is_symlink():
                raise UserError(
                    f"{path}: is a symbolic link, and the run would write to its target. Replace "
                    "it by what it points to, or choose another run.root or run.name."
                )
        if self.layout.config_yaml.is_file():
            # The next look at data replaces the last one, whatever its settings were.
            if not self.config.task == "data" == self.layout.read_task():
                check_same_config(self.path, self.config)
        elif self.path.is_dir() and _has_files(self.path):
            raise UserError(f"{self.path}: contains files, but no run; choose another run.name.")
        self.read_status()

    def _check_creatable(self) -> None:
        """Raise OSError if the directory cannot be created in the folder above that exists."""
        above = next(path for path in self.path.absolute().parents if path.exists())
        number = errno.EACCES if above.is_dir() else errno.ENOTDIR
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise OSError(number, os.strerror(number), str(above))

    def lock_token(self) -> str:
        """Return the lock's token, by which `check_shared` recognizes the directory."""
        return read_lock_token(self.layout.lock)

    def check_shared(self, token: str) -> None:
        """Check that this machine sees the directory that rank 0 has locked.

        Args:
            token: The `lock_token` on rank 0.

        Raises:
            UserError: this machine does not see it; the nodes do not share `run.root`.
        """
        check_shared_lock(self.layout.lock, token, f"run.root={self.config.run.root}")

    def read_status(self) -> Status:
        """Read status.json; return an empty `Status` if it does not exist.

        Raises:
            UserError: the file is damaged.
        """
        return Status.from_json(read_yaml(self.layout.status_json))

    def is_finished(self) -> bool:
        """Whether a run has finished here; the keys in `CHANGEABLE_ON_RESUME` may differ."""
        is_done = self.read_status().status == "done"
        return is_done and self.layout.summary_json.is_file()

    def is_finished_as_configured(self) -> bool:
        """Whether this run has finished with exactly this configuration.

        A run that finished with other values of keys in `CHANGEABLE_ON_RESUME`, such as fewer
        steps, does not count.

        Raises:
            UserError: the run has finished, but its input files or its results have changed since.
        """
        if not self.is_finished():
            return False
        saved = read_yaml(self.layout.config_yaml)
        if saved.get("identity") != self.config.identity():
            return False
        if missing_results(self.layout):
            return False
        inputs = saved.get("inputs")
        if keys := changed_inputs(inputs if isinstance(inputs, dict) else {}, self.config):
            raise UserError(
                f"{self.path}: has finished, but its input files have changed since "
                f"({', '.join(keys)}); choose another run.name for the new files."
            )
        check_results(
            self.layout,
            "Restore it; or delete it, and the same command writes it again; or choose another "
            "run.name.",
        )
        return True

    def changed_inputs(self) -> list[str]:
        """Return the config keys whose local files have changed since config.yaml was written."""
        inputs = read_yaml(self.layout.config_yaml).get("inputs")
        return changed_inputs(inputs, self.config) if isinstance(inputs, dict) else []

    def matches_source(self, name: str, digest: str) -> bool:
        """Whether the subfolder `name` has a model that was made from the source with `digest`."""
        return is_made_from(self.path / name, self.config, digest)

    def __enter__(self) -> "RunDirectory":
        """Take the lock.

        Raises:
            UserError: another process holds the lock, `run.root` is not writable, or `check` fails.
        """
        self.check()
        # Remember which folders are new, to remove them again if no run begins.
        self._new_folders = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self._lock = try_lock(self.layout.lock) or self._wait_for_earlier_start()
        except OSError as error:
            raise self._unusable_error(error) from error
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
        content = mask_secrets(asdict(self.config)) | {
            "identity": self.config.identity(),
            "inputs": input_digests(self.config),
            "command": mask_command(list(command)),
            "git_revision": git_revision(),
            "versions": package_versions(),
        }
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        if self.read_status().status:
            # Replace an old `done` first. If the process is killed between the two files, the new
            # identity must not stand beside it.
            self.write_status("running")
        atomic_write(self.layout.config_yaml, text)
        self.write_status("running")

    def write_status(self, status: str, *, exit_code: int | None = None, cause: str = "") -> None:
        """Write status.json: one of `STATES`, the exit code if the run has ended, and the cause."""
        assert status in STATES, status
        assert self._lock is not None, "the run directory is not locked"
        content = Status(
            status=status,
            exit_code=exit_code,
            cause=mask_secrets(cause),
            pid=os.getpid(),
            slurm_job=get_slurm_job_id(),
            results=result_digests(self.layout) if status == "done" else None,
            result_bytes=result_sizes(self.layout) if status == "done" else None,
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        atomic_write_json(self.layout.status_json, content.to_json())

    def write_loading(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Write loading.json: the time and memory that loading took, per rank."""
        atomic_write_json(self.layout.loading_json, {"ranks": ranks})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json. NaN and infinity, which JSON does not have, become null."""
        assert self._lock is not None, "the run directory is not locked"
        atomic_write_json(self.layout.summary_json, without_nonfinite(summary))

    def _wait_for_earlier_start(self) -> IO[str] | None:
        """Wait for the lock if an earlier start of this Slurm job holds it; return it or None."""
        job = get_slurm_job_id()
        if job is None or self.read_status().slurm_job != job:
            return None
        logger.warning(
            "%s: in use by another process, probably of an earlier start of job %s; waiting for it "
            "for up to %.0f s.", self.path, job, RELEASE_TIMEOUT,
        )  # fmt: skip
        deadline = time.monotonic() + RELEASE_TIMEOUT
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if lock := try_lock(self.layout.lock):
                return lock
        return None

    def _unusable_error(self, error: OSError) -> UserError:
        return UserError(
            f"run.root={self.config.run.root}: cannot be written to ({error}); choose another."
        )

    def _release(self) -> None:
        assert self._lock is not None
        if not self.layout.config_yaml.exists():
            self.layout.lock.unlink(missing_ok=True)
            for folder in self._new_folders:
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
