"""Renders batch files for slurm: what is asked for, then the command, then what its end means.

A batch file is complete: it can be read, kept, changed and submitted by hand. It ends in job.sh,
which is the same for every run.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hqqtrain.config import LaunchConfig

_END = Path(__file__).with_name("job.sh")
_THREADS = 'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"'


@dataclass(frozen=True)
class Work:
    """One run: the words of its command, without launch.*, and its directory."""

    words: Sequence[str]
    folder: Path


@dataclass(frozen=True)
class Batch:
    """What the batch files of one command have in common.

    Args:
        name: of the job.
        folder: takes what the job prints.
        command: how a user asked for it; a comment.
        python: the interpreter, at the same path on every node.
    """

    name: str
    folder: Path
    launch: LaunchConfig
    command: str
    python: str

    def run(self, work: Work) -> str:
        """The batch file of one run."""
        head = self._head("A run of hqqtrain", "%j")
        return _text(*head, f"folder={_quoted(work.folder)}", _words(work), *self._end())

    def sweep(self, works: Sequence[Work]) -> str:
        """The batch file of an array of runs, `launch.jobs` of them at a time."""
        array = f"--array=0-{len(works) - 1}%{self.launch.jobs}"
        head = self._head(f"A sweep of hqqtrain: {len(works)} runs", "%A_%a", array)
        cases = [
            f"  {number}) folder={_quoted(work.folder)}\n    {_words(work)} ;;"
            for number, work in enumerate(works)
        ]
        choice = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "  *) exit 2 ;;", "esac"]
        return _text(*head, *choice, *self._end())

    def table(self, words: Sequence[str]) -> str:
        """The batch file of what follows a sweep, on one core: its table."""
        alone = replace(self.launch, nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=1)
        job = replace(self, name=f"{self.name}-table", launch=alone)
        call = shlex.join([self.python, "-m", "hqqtrain", "--table", *words])
        return _text(*job._head("The table of a sweep of hqqtrain", "%j"), f"exec {call}")

    def _head(self, title: str, number: str, *more: str) -> Iterator[str]:
        yield "#!/usr/bin/env bash"
        yield f"# {title}, made by"
        yield f"#   {' '.join(self.command.splitlines())}"
        yield "# Submit it with sbatch, in the folder in which it was made."
        output = str(self.folder / f"{self.name}-").replace("%", "%%") + f"{number}.out"
        for option in (f"--job-name={self.name}", f"--output={output}", *self._asked_for(), *more):
            yield f"#SBATCH {shlex.quote(option)}"
        yield from (f"#SBATCH {option}" for option in self.launch.options)
        yield from ("set -e", *self.launch.setup, _THREADS, "")

    def _asked_for(self) -> Iterator[str]:
        """The options of sbatch. USR1 goes to the ranks, not to the shell: no `B:`."""
        launch = self.launch
        yield f"--nodes={launch.nodes}"
        yield f"--ntasks-per-node={launch.tasks}"
        for option, value in {
            "gpus-per-node": launch.gpus_per_node or None,
            "cpus-per-task": launch.cpus_per_task,
            "time": launch.time,
            "partition": launch.partition,
            "account": launch.account,
        }.items():
            if value is not None:
                yield f"--{option}={value}"
        yield from (f"--signal=USR1@{launch.grace}", "--requeue", "--open-mode=append")

    def _end(self) -> Iterator[str]:
        """The call, by srun, which does not take --cpus-per-task over from sbatch, and job.sh."""
        cores = self.launch.cpus_per_task
        asked = [f"--cpus-per-task={cores}"] if cores else []
        call = ["srun", "--kill-on-bad-exit=1", *asked, self.python, "-m", "hqqtrain"]
        yield f"hqqtrain=({shlex.join(call)})\n"
        yield _END.read_text(encoding="utf-8").rstrip()


def _words(work: Work) -> str:
    return f"words=({shlex.join(work.words)})"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _text(*lines: str) -> str:
    return "\n".join(lines) + "\n"
