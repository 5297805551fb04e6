"""Keeps the W&B id of a run in its directory, so that a requeued run stays one run in W&B.

Checkpoints contain the id as well, for a run directory that was copied without W&B's files.
"""

import re
from pathlib import Path

from hqqtrain.config.atomic import atomic_write


def run_id(run_dir: Path) -> str | None:
    """Return the W&B id of the run; None if there is none yet, or if W&B would refuse it."""
    try:
        found = _file(run_dir).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if re.fullmatch(r"[\w-]{1,128}", found, re.ASCII) else None


def keep_run_id(run_dir: Path, id: str) -> None:
    """Save `id` as the W&B id of the run."""
    file = _file(run_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, id)


def forget_run_id(run_dir: Path) -> None:
    """Delete the id. A restarted run needs a new one, because W&B drops steps it already has."""
    _file(run_dir).unlink(missing_ok=True)


def _file(run_dir: Path) -> Path:
    return run_dir / "wandb" / "run_id"
