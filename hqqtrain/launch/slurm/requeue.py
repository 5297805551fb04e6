"""Decide what happens to a Slurm job when its run ends: requeue it, or end it with an exit code.

job.sh calls this module before and after every start, which is called an attempt. A preempted job
is requeued, but not without limit: after two attempts in a row without progress, the job ends. The
record of an attempt is kept next to the job's output and not in the run directory, because a run
that is stopped while it loads has no run directory yet.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hqqtrain.common.env import get_slurm_job_id
from hqqtrain.common.errors import PREEMPTED, USER_ERROR
from hqqtrain.common.files import atomic_write
from hqqtrain.common.reading import MAX_JSON_BYTES, load_json, parse_json, read_bounded
from hqqtrain.rundir.layout import RunLayout, checkpoint_steps

MAX_ATTEMPTS_WITHOUT_PROGRESS = 2
"""The job ends after this many preempted attempts in a row without progress."""

_RECORD_TYPES = {
    "job": str,
    "fruitless": int,
    "before": dict,
    "exit_code": int | None,
    "time": float,
}


def read_attempt(folder: Path) -> dict[str, Any]:
    """Return the record of the last attempt of the run in `folder`; empty if there is none.

    Its keys are `job` (the Slurm job id), `fruitless` (preempted attempts in a row without
    progress), `before` (the progress before the attempt), `exit_code` (None until the attempt has
    ended) and `time` (of the record, in seconds since 1970).
    """
    try:
        record = load_json(_record_file(folder))
    except (OSError, ValueError):
        return {}
    is_valid = isinstance(record, dict) and all(
        isinstance(record.get(key), type_) for key, type_ in _RECORD_TYPES.items()
    )
    return record if is_valid else {}


def begin_attempt(folder: Path, job: str) -> None:
    """Record that `job` starts the run in `folder`, for the first time or again.

    Raises:
        OSError: the record cannot be written.
    """
    last = read_attempt(folder)
    fruitless = last["fruitless"] if last.get("job") == job else 0
    _record_file(folder).parent.mkdir(parents=True, exist_ok=True)
    _write_record(folder, job, fruitless, _progress(folder), exit_code=None)


def end_attempt(folder: Path, code: int, job: str) -> tuple[int, bool]:
    """Record the end of an attempt, and decide whether the job is requeued.

    Args:
        folder: the run directory, which may not exist yet.
        code: the exit code of srun.
        job: the id of the Slurm job.

    Returns:
        The exit code of the run, and whether `job` is to be requeued.

    Raises:
        OSError: the record cannot be written, so the next attempt would not know of this one.
    """
    last, after = read_attempt(folder), _progress(folder)
    before = last.get("before", {})
    code = _run_exit_code(code, before, after)
    fruitless = last.get("fruitless", 0) + 1
    if code != PREEMPTED or _has_progressed(before, after):
        fruitless = 0
    _write_record(folder, job, fruitless, before, exit_code=code)
    return code, code == PREEMPTED and fruitless < MAX_ATTEMPTS_WITHOUT_PROGRESS


def main(arguments: Sequence[str]) -> int:
    """Run `begin FOLDER`, or `end FOLDER CODE`, which may requeue the job.

    Returns:
        The exit code of the batch script.
    """
    folder, job = Path(arguments[1]), get_slurm_job_id() or ""
    try:
        if arguments[0] == "begin":
            begin_attempt(folder, job)
            return 0
        code, is_requeued = end_attempt(folder, int(arguments[2]), job)
    except OSError as error:
        _print(f"error: run.root={folder.parent}: cannot be written to ({error}); not requeued.")
        return USER_ERROR if arguments[0] == "begin" else int(arguments[2])
    if is_requeued:
        _print("preempted; requeued, and will resume.")  # before scontrol: Slurm then kills us
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if result.returncode:
            reason = result.stderr.strip()
            _print(f"error: requeueing failed: {reason}; repeat the command to resume.")
    elif code == PREEMPTED:
        _print(
            f"preempted {MAX_ATTEMPTS_WITHOUT_PROGRESS} times in a row, each time without a new "
            "checkpoint or a finished quantized/: not requeued. Set a longer launch.time or a "
            "smaller ckpt.every, or choose a partition without preemption; repeat the command to "
            "resume."
        )
    return code


def _progress(folder: Path) -> dict[str, Any]:
    """Return the progress of the run.

    Its keys are `step` (of the last checkpoint; -1 without one), `quantized` (whether quantized/ is
    there) and `status` (the text of status.json).
    """
    layout = RunLayout(folder)
    try:
        status = read_bounded(layout.status_json, MAX_JSON_BYTES).decode()
    except (OSError, ValueError):
        status = ""
    return {
        "step": max(checkpoint_steps(layout.checkpoints), default=-1),
        "quantized": layout.has_quantized,
        "status": status,
    }


def _has_progressed(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether the attempt has left less work for the next one."""
    has_new_checkpoint = after["step"] > before.get("step", -1)
    return has_new_checkpoint or (after["quantized"] and not before.get("quantized"))


def _run_exit_code(code: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Return the run's own exit code, given the exit code of srun.

    When srun has to kill ranks, its own code is larger, such as 137, and hides the code of the run.
    The code of the run is then read from status.json, provided that this attempt has written it.
    """
    if code <= PREEMPTED or after["status"] == before.get("status"):
        return code
    try:
        own_code = parse_json(after["status"])["exit_code"]
    except (ValueError, TypeError, KeyError):
        return code
    return own_code if isinstance(own_code, int) else code


def _record_file(folder: Path) -> Path:
    return folder.parent / "slurm" / f"{folder.name}.json"


def _write_record(
    folder: Path, job: str, fruitless: int, before: dict[str, Any], exit_code: int | None
) -> None:
    record = {"job": job, "fruitless": fruitless, "before": before, "exit_code": exit_code}
    record["time"] = time.time()
    atomic_write(_record_file(folder), json.dumps(record, indent=2) + "\n")


def _print(text: str) -> None:
    with suppress(OSError):  # the disk of the job's output may be full
        sys.stderr.write(f"hqqtrain: {text}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
