"""The command line: compose and check the configuration, run the task, return the exit code.

torch is only imported once the configuration has passed its checks, so a mistyped key is reported
at once, and by one rank only.
"""

import os
import sys

from hqqtrain import __version__
from hqqtrain.compose import recipe_files
from hqqtrain.compose.usage import usage
from hqqtrain.config import (
    PreemptedError,
    RankLostError,
    UserError,
    did_you_mean,
    signals,
)
from hqqtrain.config.codes import DONE, FAILED, PREEMPTED, USER_ERROR
from hqqtrain.config.secrets import masked
from hqqtrain.launch import adopt_ranks, check_same_launch, submit, submit_sweep
from hqqtrain.sweep import Sweep, run_all, show_table
from hqqtrain.sweep.plan import Plan, make_plan

EXIT_CODE_FILE = "HQQTRAIN_EXIT_CODE"
"""Environment variable by which launch.sh names the file for the exit code."""
_FLAGS = {
    "-h": "--help", "--help": "--help", "--check": "--check", "--cfg": "--cfg",
    "--version": "--version", "-m": "--multirun", "--multirun": "--multirun", "--table": "--table",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1, 2 or 3, as `--help` explains."""
    adopt_ranks(os.environ)
    code = _run_with_exit_code(sys.argv[1:] if argv is None else argv)
    _write_exit_code(code)
    return code


def _run_with_exit_code(words: list[str]) -> int:
    """Run the command line and turn every foreseen exception into a message and an exit code."""
    try:
        return _dispatch(words)
    except UserError as error:
        if _rank() == 0:  # every rank raises the same error
            print(f"hqqtrain: {masked(str(error))}", file=sys.stderr)
        return USER_ERROR
    except PreemptedError as error:
        if _rank() == 0:
            print(f"hqqtrain: {error}; run the same command again to resume.", file=sys.stderr)
        return PREEMPTED
    except RankLostError as error:
        print(f"hqqtrain: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("hqqtrain: interrupted.", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `--help | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _dispatch(words: list[str]) -> int:
    flags, overrides = _split(words)
    if not words or "--help" in flags:
        return _print(usage())
    if "--version" in flags:
        return _print(f"hqqtrain {__version__}")
    plan = _make_plan(overrides, "--multirun" in flags)
    if "--cfg" in flags:
        return _print(plan.as_recipes())
    if "--check" in flags:
        return _print(plan.directories())
    if "--table" in flags:
        return _show_table(plan)
    if plan.is_sweep or plan.is_slurm:
        _refuse_ranks()
    if plan.is_slurm:
        check_same_launch([job.config for job in plan.jobs])
        return _print(_submit(plan, words))
    if plan.is_sweep:
        return run_all(plan.jobs)
    signals.listen()  # before the import of torch, which takes seconds
    from hqqtrain.tasks.run import run

    return run(plan.jobs[0].config, ["python", "-m", "hqqtrain", *words])


def _make_plan(overrides: list[str], multirun: bool) -> Plan:
    try:
        return make_plan(overrides, multirun)
    except UserError:
        if _rank() != 0:  # rank 0 prints the same error
            raise SystemExit(USER_ERROR) from None
        raise


def _split(words: list[str]) -> tuple[set[str], list[str]]:
    """Return the flags by their long names, and the overrides, which all contain a `=`."""
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


def _show_table(plan: Plan) -> int:
    if not plan.is_sweep:
        raise UserError("--table: needs the keys of a sweep, as in --table -m quant.nbits=2,3.")
    return show_table(plan.jobs)


def _refuse_ranks() -> None:
    """Refuse several ranks: each of them would start the sweep or submit the batch job."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep or launch=slurm runs as one process, which starts the jobs: use ./launch.sh, "
            "which runs each job on all GPUs, or python -m hqqtrain; not torchrun, accelerate "
            "launch or srun."
        )


def _submit(plan: Plan, words: list[str]) -> str:
    if not plan.is_sweep:
        return submit(words, plan.jobs[0].config)
    sweep = Sweep.of(plan.jobs)
    return submit_sweep(sweep.name, [(job.command, job.config) for job in sweep.jobs], words)


def _write_exit_code(code: int) -> None:
    """Write the exit code for launch.sh, because torchrun and accelerate turn every failure into 1.

    Any rank may be the one that knows the code; its peers may only see a lost connection and return
    `FAILED`, which is therefore not written. The launcher ends all ranks as soon as the first one
    exits, so the file is not truncated: it must not be empty at any moment.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file and code not in (DONE, FAILED):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(handle, str(code).encode())
        os.close(handle)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _print(text: str) -> int:
    print(text, flush=True)
    return DONE
