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

from hqqtrain.ckpt.atomic import atomic_write_json, without_nonfinite
from hqqtrain.ckpt.lock import check_seen, take_lock, token_of
from hqqtrain.ckpt.provenance import git_revision, input_stamps, versions
from hqqtrain.config import RunConfig, UserError
from hqqtrain.config.atomic import atomic_write
from hqqtrain.config.run import MAY_CHANGE, NOT_THE_RESULT
from hqqtrain.config.secrets import masked, masked_command

STATES = ("running", "done", "preempted", "failed")
_LOCK = ".lock"
_DEFINING = RunConfig.__dataclass_fields__.keys() - set(NOT_THE_RESULT)


class RunDirectory:
    """`<run.root>/<run.name>/`: its lock, config.yaml, status.json, loading.json, summary.json.

    Use as a context manager: entering takes the lock, `begin` writes, leaving frees the lock.
    A directory in which nothing was begun is removed again.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.run.root).expanduser() / config.run_name()
        self._lock: IO[str] | None = None
        self._made: list[Path] = []

    def check(self) -> None:
        """Raises UserError where it is another configuration's, or damaged. Writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; choose another run.name or run.root.")
        if (self.path / "config.yaml").is_file():
            _refuse_another(self.path, self.config)
        elif self.path.is_dir() and _holds_files(self.path):
            raise UserError(f"{self.path}: holds files, but no run; choose another run.name.")
        self.status()

    def token(self) -> str:
        """What shows that somebody sees this very directory, for `check_shared`."""
        return token_of(self.path / _LOCK)

    def check_shared(self, token: str) -> None:
        """Raises UserError where this machine does not see what the first rank's has written."""
        check_seen(self.path / _LOCK, token, f"run.root={self.config.run.root}")

    def status(self) -> dict[str, Any]:
        """What status.json says; empty where there is none. Raises UserError for a damaged one."""
        return _read_yaml(self.path / "status.json")

    def done(self) -> bool:
        """Whether this very run is finished: status.json says so, summary.json is there.

        One that was finished with other MAY_CHANGE, as fewer steps, is not. Raises UserError where
        it was made from files that have changed since.
        """
        finished = self.status().get("status") == "done"
        if not finished or not (self.path / "summary.json").is_file():
            return False
        if _read_yaml(self.path / "config.yaml").get("identity") != self.config.identity():
            return False
        if _read_yaml(self.path / "config.yaml").get("inputs") != input_stamps(self.config):
            raise UserError(
                f"{self.path}: is done, but made from files that have changed since; choose "
                "another run.name for the new ones."
            )
        return True

    def holds(self, name: str) -> bool:
        """Whether the model in the folder `name` is whole, and of the source that is there now."""
        made_from = _read_yaml(self.path / "config.yaml").get("inputs") or {}
        key = "model.name_or_path"
        same = made_from.get(key) == input_stamps(self.config).get(key)
        return same and (self.path / name / "config.json").is_file()

    def __enter__(self) -> "RunDirectory":
        """Take the lock. Raises UserError while another process holds it, or as `check` does."""
        self.check()
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
            self.check()
        except UserError:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def begin(self, command: Sequence[str]) -> None:
        """Write config.yaml (resolved, versions, git revision, command) and status `running`."""
        resolved = masked(asdict(self.config)) | {
            "identity": self.config.identity(),
            "inputs": input_stamps(self.config),
            "command": masked_command(list(command)),
            "git_revision": git_revision(),
            "versions": versions(),
        }
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        if self.status():
            self.write_status("running")  # else a kill here leaves the new identity, and `done`
        atomic_write(self.path / "config.yaml", text)
        self.write_status("running")

    def write_status(self, status: str, *, exit_code: int | None = None, cause: str = "") -> None:
        """Write status.json: one of STATES, the exit code where it has ended, and why."""
        assert status in STATES, status
        assert self._lock is not None, "the run directory is not locked"
        facts = {"status": status, "exit_code": exit_code, "cause": masked(cause),
                 "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}  # fmt: skip
        atomic_write_json(self.path / "status.json", facts)

    def write_loading(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Write loading.json: what loading the model took, rank by rank."""
        atomic_write_json(self.path / "loading.json", {"ranks": ranks})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json; figures that are not finite, which JSON lacks, become null."""
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


def _holds_files(folder: Path) -> bool:
    """Whether `folder` holds more than what an attempt that was killed leaves behind."""
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _refuse_another(folder: Path, config: RunConfig) -> None:
    path = folder / "config.yaml"
    there, here = _read_yaml(path), masked(asdict(config))
    if "identity" not in there:  # it stands behind the configuration
        raise _damaged(path, "it is incomplete")
    if there.get("identity") == config.identity():
        return
    old, new = _flat(there), _flat(here)
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if keys and all(k in MAY_CHANGE for k in keys):
        return
    shown = "; ".join(f"{k}={_text(new, k)} (there {_text(old, k)})" for k in keys)
    raise UserError(
        f"{folder}: holds a run of another configuration: {shown or 'of another version'}. Choose "
        "another run.name, or null, which gives each configuration a directory of its own."
    )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """`group.key` -> value of all that defines the result."""
    flat: dict[str, Any] = {}
    for group, value in values.items():
        if group in _DEFINING:
            keys = value if isinstance(value, dict) else {"": value}
            flat |= {f"{group}.{k}".rstrip("."): v for k, v in keys.items()}
    return flat


def _text(flat: dict[str, Any], name: str) -> str:
    if name not in flat:
        return "absent"
    return "null" if flat[name] is None else str(flat[name])


def _read_yaml(path: Path) -> dict[str, Any]:
    """A YAML or JSON object; empty where there is no file. Raises UserError for anything else."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no keys")
    return found


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: cannot be read ({why}). Choose another run.name, or bring the file back as the "
        "run wrote it."
    )


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
