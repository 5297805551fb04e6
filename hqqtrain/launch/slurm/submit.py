"""Gives a run, or a sweep and the job that makes its table, to slurm.

What is submitted is kept in `<run.root>/slurm/`, beside what the jobs print.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write
from hqqtrain.compose.compose import compose_unchecked
from hqqtrain.config.infra import LaunchConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.launch.slurm.batch import BatchScript
from hqqtrain.launch.slurm.validate import refuse_backslash, refuse_secrets, without_launch

_NOT_PASSED_ON = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                  "MASTER_PORT", "HQQTRAIN_EXIT_CODE")  # fmt: skip
"""A job has ranks of its own. sbatch passes the rest of the environment on, unless told not to."""


def submit_job(words: Sequence[str], config: RunConfig) -> str:
    """Submits one run; `words` are its command line. Returns what to tell the user: the job's id,
    or with launch.dry_run the batch file itself.

    Raises:
        UserError: there is no sbatch, it refuses the job, `run.root` cannot be written to, or
            `words` hold a secret.
    """
    refuse_secrets(words, config.launch)
    batch = _batch(config.run_name(), words, config)
    text = batch.run(_inner(words, config))
    if config.launch.dry_run:
        return text.rstrip()
    job = _sbatch(_write(batch, batch.name, text))
    return f"submitted job {job}: {batch.folder.parent / batch.name}; its output: {batch.folder}"


def submit_sweep(
    name: str, jobs: Sequence[tuple[Sequence[str], RunConfig]], words: Sequence[str]
) -> str:
    """Submits the runs of a sweep as one array, and after it the job that makes their table.

    Args:
        name: the sweep's.
        jobs: the words and the configuration of every run; see `check_same_launch`.
        words: the sweep's own command line, with its flags.

    Returns and raises as `submit_job`.
    """
    every = dict.fromkeys([*words, *(word for job, _ in jobs for word in job)])
    refuse_secrets(every, jobs[0][1].launch)
    batch = _batch(name, words, jobs[0][1])
    undone = dict.fromkeys(word for job in jobs for word in _taken_back(*job))
    inner = [*without_launch(words), *undone]
    array, table = batch.sweep([_inner(*job) for job in jobs], inner), batch.table(inner)
    if batch.launch.dry_run:
        return _two_files(batch, array, table)
    job = _sbatch(_write(batch, name, array))
    try:
        last = _sbatch(_write(batch, f"{name}-table", table), f"--dependency=afterany:{job}")
    except UserError as error:
        raise UserError(f"{error} The runs are submitted; scancel {job} would end them.") from None
    return f"submitted jobs {job}_[0-{len(jobs) - 1}], then {last}; their output: {batch.folder}"


def _two_files(batch: BatchScript, array: str, table: str) -> str:
    """Both, each with its name. As one file sbatch would refuse them: its first line is no `#!`."""
    first, second = (
        shlex.quote(str(batch.folder / f"{batch.name}{end}.sbatch")) for end in ("", "-table")
    )
    return (
        f"# Two files, to be submitted one by one. The first, the runs: sbatch {first}\n{array}\n"
        f"# The second file, their table: sbatch --dependency=afterany:JOB {second}\n"
        f"# JOB is the number that sbatch has told of the first.\n{table}"
    ).rstrip()


def _inner(words: Sequence[str], config: RunConfig) -> list[str]:
    """The words of the command inside of the job."""
    return [*without_launch(words), *_taken_back(words, config)]


def _batch(name: str, words: Sequence[str], config: RunConfig) -> BatchScript:
    shown = [word for word in words if not word.startswith("launch.dry_run=")]
    refuse_backslash(config.run.root)
    command = shlex.join(["python", "-m", "hqqtrain", *shown])
    folder = Path(config.run.root).expanduser() / "slurm"
    return BatchScript(name, folder, config.launch, command, sys.executable)


def _taken_back(words: Sequence[str], config: RunConfig) -> list[str]:
    """Words that undo what a recipe says of launch.*: else the job would submit a job."""
    plain = LaunchConfig()
    if config.launch == plain:
        return []
    recipe = compose_unchecked(without_launch(words)).launch  # unchecked: nodes without a backend
    names = [f.name for f in fields(plain) if getattr(recipe, f.name) != getattr(plain, f.name)]
    return [f"launch.{name}={_text(getattr(plain, name))}" for name in names]


def _text(value: object) -> str:
    return "null" if value is None else str(value)


def _write(batch: BatchScript, name: str, text: str) -> Path:
    try:
        batch.folder.mkdir(parents=True, exist_ok=True)
        return atomic_write(batch.folder / f"{name}.sbatch", text)
    except OSError as error:
        raise UserError(
            f"run.root={batch.folder.parent}: cannot be written to ({error}); choose another."
        ) from error


def _sbatch(file: Path, *options: str) -> str:
    """Submits `file` and returns the job's id."""
    environ = {k: v for k, v in os.environ.items() if not _is_of_this_process(k)}
    command = ["sbatch", "--parsable", *options, str(file)]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "launch.backend=slurm: there is no sbatch on this machine; submit from a login node, "
            f"or see the batch file with launch.dry_run=true ({file})."
        ) from None
    if done.returncode:
        told = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"launch.backend=slurm: sbatch refuses {file}: {told}")
    return done.stdout.strip().partition(";")[0]  # id;cluster


def _is_of_this_process(name: str) -> bool:
    """Within a job, slurm's variables are that job's, and a step's would number the new one's."""
    return name in _NOT_PASSED_ON or (name.startswith("SLURM_") and name != "SLURM_CONF")
