"""The W&B id of a run, kept in its directory: a run that is requeued stays one run there.

A checkpoint keeps the id as well, for a directory that was copied without W&B's files.
"""

import re
from pathlib import Path

from hqqtrain.common.files import atomic_write
from hqqtrain.rundir.layout import RunLayout


def run_id(run_dir: Path) -> str | None:
    """The id that `run_dir` keeps; None where there is none yet, or none that W&B would take."""
    try:
        found = _file(run_dir).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if re.fullmatch(r"[\w-]{1,128}", found, re.ASCII) else None


def keep_run_id(run_dir: Path, id: str) -> None:
    """Makes `id` the one that `run_dir` goes on with."""
    file = _file(run_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, id)


def forget_run_id(run_dir: Path) -> None:
    """A run that begins anew is another one there: W&B drops steps that it has had."""
    _file(run_dir).unlink(missing_ok=True)


def _file(run_dir: Path) -> Path:
    return RunLayout(run_dir).wandb / "run_id"
