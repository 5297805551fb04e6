"""The command line: composes, checks and hands over to the task; the meaning of exit codes.

Nothing here imports torch before the configuration is known to be sound: a mistyped key is
reported in a moment, and by one rank only.
"""

import os
import sys

from hqqtrain import __version__
from hqqtrain.common import signals
from hqqtrain.common.errors import PreemptedError, RankLostError, UserError, did_you_mean
from hqqtrain.common.exit_codes import DONE, FAILED, PREEMPTED, USER_ERROR
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.compose.command import Command, plan_command
from hqqtrain.compose.help import help_text
from hqqtrain.compose.recipes import recipe_files
from hqqtrain.launch.slurm.ranks import set_rank_env_from_slurm
from hqqtrain.launch.slurm.submit import submit_job, submit_sweep
from hqqtrain.launch.slurm.validate import check_same_launch
from hqqtrain.launch.sweep.runner import run_all, show_table
from hqqtrain.launch.sweep.sweep import Sweep

EXIT_CODE_FILE = "HQQTRAIN_EXIT_CODE"
_FLAGS = {
    "-h": "--help", "--help": "--help", "--check": "--check", "--cfg": "--cfg",
    "--version": "--version", "-m": "--multirun", "--multirun": "--multirun", "--table": "--table",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 1, 2 or 3, see `--help`."""
    set_rank_env_from_slurm(os.environ)
    code = _guarded(sys.argv[1:] if argv is None else argv)
    _tell_launcher(code)
    return code


def _guarded(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except UserError as error:
        if _rank() == 0:  # what one rank finds is raised on all
            print(f"hqqtrain: {mask_secrets(str(error))}", file=sys.stderr)
        return USER_ERROR
    except PreemptedError as error:
        if _rank() == 0:
            print(f"hqqtrain: {error}; the same command goes on.", file=sys.stderr)
        return PREEMPTED
    except RankLostError as error:
        print(f"hqqtrain: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("hqqtrain: interrupted.", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `--help | head`: whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _dispatch(words: list[str]) -> int:
    flags, overrides = _split(words)
    if not words or "--help" in flags:
        return _say(help_text())
    if "--version" in flags:
        return _say(f"hqqtrain {__version__}")
    plan = _plan(overrides, "--multirun" in flags)
    if "--cfg" in flags:
        return _say(plan.as_recipes())
    if "--check" in flags:
        return _say(plan.directories())
    if "--table" in flags:
        return _table(plan)
    if plan.is_sweep or plan.is_slurm:
        _refuse_ranks()
    if plan.is_slurm:
        check_same_launch([job.config for job in plan.jobs])
        return _say(_submit(plan, words))
    if plan.is_sweep:
        return run_all(plan.jobs)
    signals.listen_for_signals()  # importing takes seconds
    from hqqtrain.tasks.run import run_task

    return run_task(plan.jobs[0].config, ["python", "-m", "hqqtrain", *words])


def _plan(overrides: list[str], multirun: bool) -> Command:
    try:
        return plan_command(overrides, multirun)
    except UserError:
        if _rank() != 0:  # rank 0 says the same
            raise SystemExit(USER_ERROR) from None
        raise


def _split(words: list[str]) -> tuple[set[str], list[str]]:
    """The flags, by their long names, and the overrides, which all hold a `=`."""
    flags, overrides = set(), []
    for word in words:
        if word.startswith("-"):
            if word not in _FLAGS:
                raise UserError(f"{word}: unknown option.{did_you_mean(word, _FLAGS)} See --help.")
            flags.add(_FLAGS[word])
        elif "=" not in word and not word.startswith("~"):
            known = did_you_mean(f"recipe={word}", (f"recipe={name}" for name in recipe_files()))
            raise UserError(f"{word}: must be key=value.{known} See --help.")
        else:
            overrides.append(word)
    return flags, overrides


def _table(plan: Command) -> int:
    if not plan.is_sweep:
        raise UserError("--table: needs the words of a sweep, as in --table -m quant.nbits=2,3.")
    return show_table(plan.jobs)


def _refuse_ranks() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep, or launch=slurm, is one process that starts others: use ./launch.sh, which "
            "launches each on all GPUs, or python -m hqqtrain; not torchrun, accelerate launch or "
            "srun."
        )


def _submit(plan: Command, words: list[str]) -> str:
    if not plan.is_sweep:
        return submit_job(words, plan.jobs[0].config)
    sweep = Sweep.of(plan.jobs)
    return submit_sweep(sweep.name, [(job.command, job.config) for job in sweep.jobs], words)


def _tell_launcher(code: int) -> None:
    """Lets launch.sh return our code: torchrun and accelerate turn every failure into 1.

    Any rank may be the one that found the fault; its peers then only see a lost connection. The
    first that ends makes the launcher end the others, so the file is never empty on the way.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file and code not in (DONE, FAILED):
        told = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(told, str(code).encode())
        os.close(told)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(text: str) -> int:
    print(text, flush=True)
    return DONE
