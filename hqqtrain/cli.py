"""The command line: compose and check the configuration, run the task, return the exit code.

torch is only imported once the configuration has passed its checks, so a mistyped key is reported
at once, and by one rank only.
"""

import os
import sys
from difflib import get_close_matches

from hqqtrain import __version__
from hqqtrain.common import signals
from hqqtrain.common.env import check_master_address, check_rank_variables, get_rank, get_world_size
from hqqtrain.common.errors import (
    DONE,
    FAILED,
    PREEMPTED,
    USER_ERROR,
    ErrorCollector,
    PreemptedError,
    RankLostError,
    UserError,
    did_you_mean,
    error_line,
)
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.common.stdio import (
    escape_unencodable,
    open_missing_streams,
    tolerate_lost_errors,
    tolerate_lost_output,
)
from hqqtrain.compose.command import Command, compose_command
from hqqtrain.compose.help import help_text
from hqqtrain.compose.inputs import has_inputs_to_check, list_inputs
from hqqtrain.compose.recipes import find_recipes
from hqqtrain.compose.schema import known_keys
from hqqtrain.config.foreign_names import our_name, reason_to_leave_out
from hqqtrain.config.run import TASKS
from hqqtrain.launch.slurm.ranks import set_rank_env_from_slurm
from hqqtrain.launch.slurm.submit import submit_job, submit_sweep
from hqqtrain.launch.slurm.validate import check_same_launch
from hqqtrain.launch.sweep.runner import run_sweep, show_sweep_table
from hqqtrain.launch.sweep.sweep import Sweep
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.saved_state import resume_advice

EXIT_CODE_VARIABLE = "HQQTRAIN_EXIT_CODE"
"""launch.sh sets this environment variable to the file that receives the exit code."""

_FLAGS = {
    "-h": "--help", "--help": "--help", "--check": "--check", "--cfg": "--cfg", "-c": "--cfg",
    "--version": "--version", "-m": "--multirun", "--multirun": "--multirun", "--table": "--table",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1, 2 or 3, as `--help` explains."""
    open_missing_streams()
    tolerate_lost_errors()
    escape_unencodable()
    set_rank_env_from_slurm(os.environ)
    code = _run_with_exit_code(sys.argv[1:] if argv is None else argv)
    _write_exit_code(code)
    return code


def _run_with_exit_code(arguments: list[str]) -> int:
    """Run the command line. Turn every expected exception into a message and an exit code."""
    try:
        return _run_command(arguments)
    except UserError as error:
        if error.is_of_one_rank or get_rank() == 0:  # usually every rank raises the same error
            print(error_line(error), file=sys.stderr)
        return USER_ERROR
    except PreemptedError as error:
        if get_rank() == 0:
            print(f"hqqtrain: {mask_secrets(str(error))}.", file=sys.stderr)
        return PREEMPTED
    except RankLostError as error:
        print(error_line(error), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("hqqtrain: interrupted.", file=sys.stderr)
        return FAILED


def _run_command(arguments: list[str]) -> int:
    """Run what the flags and overrides ask for, and return the exit code."""
    flags, overrides = _split_flags(arguments)
    if not arguments or "--help" in flags:
        return _print(help_text())
    if "--version" in flags:
        return _print(f"hqqtrain {__version__}")
    check_rank_variables()
    try:
        command = compose_command(overrides, "--multirun" in flags)
    except UserError as error:
        if "--check" not in flags:
            raise
        raise UserError(
            f"{error}\nThe model, the texts and the run directory are only checked once the "
            "configuration has no faults."
        ) from error
    if "--cfg" in flags:
        return _print(command.as_recipes())
    _print_notes(command)
    if "--check" in flags:
        return _check(command)
    # From here on the results are in files, so text that cannot be printed is no failure.
    if any(job.config.has_run_directory for job in command.jobs):
        tolerate_lost_output()
    return _show_table(command) if "--table" in flags else _start(command, arguments)


def _start(command: Command, arguments: list[str]) -> int:
    """Start the run, the sweep or the batch job, and return the exit code."""
    if command.is_sweep or command.is_slurm:
        _refuse_ranks(
            "a sweep or launch=slurm runs as one process, which starts the jobs",
            ", which runs each job on all GPUs",
        )
    if command.is_slurm:
        check_same_launch([job.config for job in command.jobs])
        return _print(_submit(command, arguments))
    if command.is_sweep:
        return run_sweep(command.jobs)
    config = command.jobs[0].config
    check_master_address()
    if not config.has_run_directory:
        _refuse_ranks(f"task={config.task} runs as one process")
    else:
        if get_world_size() == 1:  # several ranks let rank 0 look, and share the outcome
            RunDirectory(config).check()
        signals.listen_for_signals()  # before the import of torch, which takes seconds
    from hqqtrain.tasks.run import run_task

    try:
        return run_task(config, arguments)
    except PreemptedError as error:
        raise PreemptedError(f"{error}; {resume_advice(config)}") from error


def _print_notes(command: Command) -> None:
    if get_rank() == 0:  # the other ranks have the same
        for note in command.notes():
            print(f"hqqtrain: {mask_secrets(note)}", file=sys.stderr)


def _check(command: Command) -> int:
    """Print the directories of the runs, and what else was checked, and return the exit code.

    Raises:
        UserError: There are faults. The message has a line for each of all jobs.
    """
    checked, errors = ["the configuration"], ErrorCollector()
    for job in command.jobs:
        with errors.collect():
            if job.config.has_run_directory:
                RunDirectory(job.config).check()
                checked.append("the run directory")
        if name := job.config.hub.push:
            checked.append(f"hub.push={name} is on the hub and was not checked")
        if has_inputs_to_check(job.config):
            from hqqtrain.tasks.run import check_inputs

            with errors.collect():
                checked += check_inputs(job.config)
        checked += [
            f"{item.key}={item.name} is on the hub and was not checked"
            for item in list_inputs(job.config)
            if not item.is_local
        ]
    errors.raise_if_any()
    if get_rank() > 0:  # the other ranks have the same
        return DONE
    print(f"hqqtrain: checked: {'; '.join(dict.fromkeys(checked))}.", file=sys.stderr)
    return _print(command.describe_directories())


def _split_flags(arguments: list[str]) -> tuple[set[str], list[str]]:
    """Return the flags by their long names, and the overrides.

    An override contains a `=`. One that removes a key (`~key`) passes too, because composing the
    configuration refuses it with a better message.
    """
    flags, overrides, previous, errors = set(), [], "", []
    for argument in arguments:
        # The word after an unknown option is its value, as in `--lr 1e-3` of other tools.
        is_value = previous.startswith("-") and previous not in _FLAGS and "=" not in previous
        if previous in ("-c", "--cfg") and argument in ("job", "hydra", "all"):  # as in Hydra
            if argument != "job":
                raise UserError(
                    f"{previous} {argument}: {previous} prints the configuration of the run, "
                    "without Hydra's own; leave the word out."
                )
        elif argument.startswith("-"):
            if argument in _FLAGS:
                flags.add(_FLAGS[argument])
            else:
                errors.append(f"{argument}: unknown option.{_suggest(argument)} See --help.")
        elif "=" in argument or argument.startswith("~"):
            overrides.append(argument)
        elif not is_value:
            errors.append(f"{argument}: must be key=value.{_suggest_pair(argument)} See --help.")
        previous = argument
    if errors:
        raise UserError("\n".join(errors))
    return flags, overrides


def _suggest_pair(word: str) -> str:
    """Return a hint for a word without `=`: a task, a recipe, an option or a key."""
    if word in dict(known_keys()):
        return f" Write {word}=value, without spaces."
    meanings = {flag.lstrip("-"): flag for flag in _FLAGS if flag.startswith("--")}
    meanings |= {name: f"recipe={name}" for name in find_recipes()}
    meanings |= {name: f"task={name}" for name in TASKS}
    close = get_close_matches(word, meanings, n=1)
    return f" Did you mean '{meanings[close[0]]}'?" if close else ""


def _suggest(option: str) -> str:
    """Return a hint for an unknown option, which may be a key as other tools write it."""
    name, equals, value = option.lstrip("-").partition("=")
    known = [key for key, _ in known_keys()]
    ending = f".{name.replace('-', '_')}"
    same_name = (f"'{key}'" for key in known if key.endswith(ending))
    if name not in known and (reason := reason_to_leave_out(name)):
        return f" Leave it out: {reason}."
    if name not in known and (ours := our_name(name) or next(same_name, None)):
        return f" Did you mean {ours}? Keys have no dashes: key=value."
    if name in known or equals:
        return f" Keys have no dashes: {name}={value if equals else 'value'}."
    return did_you_mean(option, _FLAGS)


def _show_table(command: Command) -> int:
    if not command.is_sweep:
        raise UserError("--table: needs the keys of a sweep, as in --table -m quant.nbits=2,3.")
    return show_sweep_table(command.jobs)


def _refuse_ranks(reason: str, what_launch_does: str = "") -> None:
    """Refuse several ranks: each of them would start the sweep, or answer the same prompts."""
    if get_world_size() > 1:
        raise UserError(
            f"{reason}: use ./launch.sh{what_launch_does}, or python -m hqqtrain. Do not use "
            "torchrun, accelerate launch or srun."
        )


def _submit(command: Command, arguments: list[str]) -> str:
    """Submit the run or the sweep to Slurm, and return the text to print."""
    if not command.is_sweep:
        return submit_job(arguments, command.jobs[0].config)
    sweep = Sweep.from_jobs(command.jobs)
    return submit_sweep(sweep.name, [(job.arguments, job.config) for job in sweep.jobs], arguments)


def _write_exit_code(code: int) -> None:
    """Write the exit code for launch.sh, because torchrun and accelerate turn every failure into 1.

    Only the rank that raised the original error knows the exit code. Others may see a lost
    connection and return `FAILED`, so `FAILED` is not written. The launcher may kill this process
    at any time, so the file is opened without O_TRUNC: a second writer must not empty it.
    """
    file = os.environ.get(EXIT_CODE_VARIABLE)
    if file and code not in (DONE, FAILED):
        fd = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, str(code).encode())
        os.close(fd)


def _print(text: str) -> int:
    """Print `text`, and return the exit code of a command that only prints."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Python flushes the rest of the text when it exits, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `--help | head`: the reader has seen enough
            return DONE
        message = f"standard output: cannot be written to ({error})."
        print(error_line(message), file=sys.stderr)
        return FAILED
    return DONE
