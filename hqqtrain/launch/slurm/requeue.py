"""What the end of a run means for its job: requeued or ended, and with which exit code.

job.sh asks before and after every start. A job that is preempted is requeued, but not for ever: two
starts in a row that got no further end it. What was seen is kept beside what the job prints, as a
run that is stopped while it loads has no directory of its own yet.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hqqtrain.common.exit_codes import PREEMPTED, USER_ERROR
from hqqtrain.common.files import atomic_write
from hqqtrain.rundir.layout import RunLayout, checkpoint_steps

MAX_ATTEMPTS_WITHOUT_PROGRESS = 2
"""Starts in a row that were preempted and got no further: so many end the job."""

_NOTE = {"job": str, "fruitless": int, "before": dict, "exit_code": int | None, "time": float}


def read_attempt(folder: Path) -> dict[str, Any]:
    """What was noted of the last start of the run in `folder`; empty where nothing was.

    `exit_code` is None until it has ended; `time` is in seconds since 1970.
    """
    try:
        note = json.loads(_file(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if _is_sound(note) else {}


def begin_attempt(folder: Path, job: str) -> None:
    """`job` starts the run in `folder`, for the first time or again. OSError: cannot be noted."""
    last = read_attempt(folder)
    fruitless = last["fruitless"] if last.get("job") == job else 0
    _file(folder).parent.mkdir(parents=True, exist_ok=True)
    _keep(folder, {"job": job, "fruitless": fruitless, "before": _seen(folder), "exit_code": None})


def end_attempt(folder: Path, code: int, job: str) -> tuple[int, bool]:
    """(exit code, whether `job` is to be requeued) after a start that srun says ended with `code`.

    Raises OSError where it cannot be noted, and so would not be known the next time.
    """
    last, now = read_attempt(folder), _seen(folder)
    before = last.get("before", {})
    code = _own_code(code, before, now)
    fruitless = last.get("fruitless", 0) + 1
    if code != PREEMPTED or _got_further(before, now):
        fruitless = 0
    _keep(folder, {"job": job, "fruitless": fruitless, "before": before, "exit_code": code})
    return code, code == PREEMPTED and fruitless < MAX_ATTEMPTS_WITHOUT_PROGRESS


def main(words: Sequence[str]) -> int:
    """`begin FOLDER`, or `end FOLDER CODE`, which requeues the job; returns the exit code."""
    folder, job = Path(words[1]), _job(os.environ)
    try:
        if words[0] == "begin":
            begin_attempt(folder, job)
            return 0
        code, again = end_attempt(folder, int(words[2]), job)
    except OSError as error:
        _say(f"run.root={folder.parent}: cannot be written to ({error}); not requeued.")
        return USER_ERROR if words[0] == "begin" else int(words[2])
    if again:
        _requeue(job)
    elif code == PREEMPTED:
        _say(
            f"preempted {MAX_ATTEMPTS_WITHOUT_PROGRESS} times in a row, each time without a new checkpoint or a "
            "finished quantized/: not requeued. It needs a longer launch.time, a smaller "
            "ckpt.every, or a partition where it is not stopped; the same command goes on."
        )
    return code


def _requeue(job: str) -> None:
    _say("preempted; requeued, to go on where it was.")  # slurm ends us at once
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        _say(f"not requeued after all: {done.stderr.strip()}; the same command goes on.")


def _job(environ: Mapping[str, str]) -> str:
    """The last task of an array has the array's own SLURM_JOB_ID, which stands for all of them."""
    if array := environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def _seen(folder: Path) -> dict[str, Any]:
    """How far the run has got, and what it says of itself."""
    layout = RunLayout(folder)
    try:
        status = layout.status_json.read_text(encoding="utf-8")
    except (OSError, ValueError):
        status = ""
    return {
        "step": max(checkpoint_steps(layout.checkpoints), default=-1),
        "quantized": layout.has_quantized,
        "status": status,
    }


def _got_further(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the next start has less to do."""
    steps = now["step"] > before.get("step", -1)
    return steps or (now["quantized"] and not before.get("quantized"))


def _own_code(code: int, before: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """The run's own: ranks that srun had to end make its code larger than that."""
    if code <= PREEMPTED or now["status"] == before.get("status"):
        return code
    try:
        said = json.loads(now["status"])["exit_code"]
    except (ValueError, TypeError, KeyError):
        return code
    return said if isinstance(said, int) else code


def _file(folder: Path) -> Path:
    return folder.parent / "slurm" / f"{folder.name}.json"


def _keep(folder: Path, note: dict[str, Any]) -> None:
    atomic_write(_file(folder), json.dumps({**note, "time": time.time()}, indent=2) + "\n")


def _is_sound(note: Any) -> bool:
    return isinstance(note, dict) and all(isinstance(note.get(k), t) for k, t in _NOTE.items())


def _say(text: str) -> None:
    sys.stderr.write(f"hqqtrain: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
