"""Submit a run, or a sweep and the job that writes its table, to Slurm.

The batch files are kept in `<run.root>/slurm/`, next to the output of the jobs.
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

_NOT_PASSED_ON = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "HQQTRAIN_EXIT_CODE",
)
"""Variables hidden from sbatch, because a job has its own ranks. sbatch passes on all others."""


def submit_job(arguments: Sequence[str], config: RunConfig) -> str:
    """Submit one run.

    Args:
        arguments: the arguments of its command line.
        config: its configuration.

    Returns:
        The text to print: the id of the job, or with `launch.dry_run` the batch file itself.

    Raises:
        UserError: sbatch is missing or refuses the job, `run.root` cannot be written to, or
            `arguments` contain a secret.
    """
    refuse_secrets(arguments, config.launch)
    batch = _batch(config.run_name(), arguments, config)
    text = batch.render_run(_overrides_in_job(arguments, config))
    if config.launch.dry_run:
        return text.rstrip()
    job = _sbatch(_write(batch, batch.name, text))
    return f"submitted job {job}: {batch.folder.parent / batch.name}; its output: {batch.folder}"


def submit_sweep(
    name: str, jobs: Sequence[tuple[Sequence[str], RunConfig]], arguments: Sequence[str]
) -> str:
    """Submit the runs of a sweep as one job array, and a dependent job that writes their table.

    Args:
        name: the name of the sweep.
        jobs: the overrides and the configuration of every run. The caller must have checked them
            with `check_same_launch`.
        arguments: the arguments of the sweep's own command, flags included.

    Returns:
        The text to print: the ids of the jobs, or with `launch.dry_run` the batch files.

    Raises:
        UserError: as for `submit_job`.
    """
    job_arguments = [argument for overrides, _ in jobs for argument in overrides]
    distinct_arguments = dict.fromkeys([*arguments, *job_arguments])  # in order
    refuse_secrets(distinct_arguments, jobs[0][1].launch)
    batch = _batch(name, arguments, jobs[0][1])
    resets = dict.fromkeys(argument for job in jobs for argument in _launch_resets(*job))
    sweep_arguments = [*without_launch(arguments), *resets]
    array = batch.render_sweep([_overrides_in_job(*job) for job in jobs], sweep_arguments)
    table = batch.render_table(sweep_arguments)
    if batch.launch.dry_run:
        return _format_both_files(batch, array, table)
    job = _sbatch(_write(batch, name, array))
    try:
        table_job = _sbatch(_write(batch, f"{name}-table", table), f"--dependency=afterany:{job}")
    except UserError as error:
        raise UserError(f"{error} The runs are submitted; scancel {job} cancels them.") from None
    array_tasks = f"{job}_[0-{len(jobs) - 1}]"
    return f"submitted jobs {array_tasks}, then {table_job}; their output: {batch.folder}"


def _format_both_files(batch: BatchScript, array: str, table: str) -> str:
    """Return both batch files, each below a comment with its name and its sbatch command.

    sbatch refuses the text as a single file, because its first line does not begin with `#!`.
    """
    array_file, table_file = (
        shlex.quote(str(batch.folder / f"{batch.name}{suffix}.sbatch")) for suffix in ("", "-table")
    )
    return (
        f"# Two files; submit them one by one. The first file, the runs: sbatch {array_file}\n"
        f"{array}\n"
        f"# The second file, their table: sbatch --dependency=afterany:JOB {table_file}\n"
        f"# JOB is the job id that sbatch printed for the first file.\n{table}"
    ).rstrip()


def _overrides_in_job(arguments: Sequence[str], config: RunConfig) -> list[str]:
    """Return the overrides of the command that runs inside the job."""
    return [*without_launch(arguments), *_launch_resets(arguments, config)]


def _batch(name: str, arguments: Sequence[str], config: RunConfig) -> BatchScript:
    """Return the renderer of the batch files of the command `python -m hqqtrain *arguments`."""
    refuse_backslash(config.run.root)
    # With or without a dry run, the batch file is the same.
    kept = [argument for argument in arguments if not argument.startswith("launch.dry_run=")]
    command = shlex.join(["python", "-m", "hqqtrain", *kept])
    folder = Path(config.run.root).expanduser() / "slurm"
    return BatchScript(name, folder, config.launch, command, sys.executable)


def _launch_resets(arguments: Sequence[str], config: RunConfig) -> list[str]:
    """Return overrides that reset `launch.*` to its defaults where the recipe sets it.

    Without them the job would read launch.backend=slurm from the recipe and submit another job.
    """
    defaults = LaunchConfig()
    if config.launch == defaults:
        return []
    # The check would fail for a recipe that sets launch.nodes but not launch.backend.
    recipe_launch = compose_unchecked(without_launch(arguments)).launch
    resets = []
    for name in (field.name for field in fields(defaults)):
        default = getattr(defaults, name)
        if getattr(recipe_launch, name) != default:
            resets.append(f"launch.{name}={'null' if default is None else default}")
    return resets


def _write(batch: BatchScript, name: str, text: str) -> Path:
    """Write the batch file `name` and return its path."""
    try:
        batch.folder.mkdir(parents=True, exist_ok=True)
        return atomic_write(batch.folder / f"{name}.sbatch", text)
    except OSError as error:
        root = batch.folder.parent
        raise UserError(
            f"run.root={root}: cannot be written to ({error}); choose another folder."
        ) from error


def _sbatch(file: Path, *options: str) -> str:
    """Submit `file` and return the id of the job."""
    environ = {k: v for k, v in os.environ.items() if not _is_hidden(k)}
    command = ["sbatch", "--parsable", *options, str(file)]
    try:
        result = subprocess.run(command, env=environ, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "launch.backend=slurm: there is no sbatch on this machine; submit from a login node, "
            f"or print the batch file ({file}) with launch.dry_run=true."
        ) from None
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise UserError(f"launch.backend=slurm: sbatch refuses {file}: {reason}")
    return result.stdout.strip().partition(";")[0]  # sbatch prints ID or ID;CLUSTER


def _is_hidden(name: str) -> bool:
    """Whether sbatch must not see the variable `name`.

    When a job submits another job, Slurm's variables describe the old job, and those of a step
    would number the ranks of the new one.
    """
    return name in _NOT_PASSED_ON or (name.startswith("SLURM_") and name != "SLURM_CONF")
