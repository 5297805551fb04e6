"""Renders batch files for slurm: what is asked for, then the command, then what its end means.

A batch file is complete: it can be read, kept, changed and submitted by hand. It ends in job.sh,
which is the same for every run.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hqqtrain.config.infra import LaunchConfig

_END = Path(__file__).with_name("job.sh")

_RESOURCES = re.compile(
    "gres.*|(gpu|cpu|mem|tres|ntasks|cores|sockets|threads)[s-].*|mem|ntasks|mincpus|nodes|nodelist"
    "|nodefile|exclusive|oversubscribe|overcommit|constraint|cluster-constraint|prefer|contiguous"
    "|switches|tmp|licenses|bb|bbf|distribution|extra-node-info|hint|core-spec|thread-spec"
    "|use-min-nodes|spread-job|array"
)

_SHORT_RESOURCES = frozenset(f"-{letter}" for letter in "BCFGLNOSacmnsw")

_THREADS = 'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"'


@dataclass(frozen=True)
class BatchScript:
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

    def run(self, words: Sequence[str]) -> str:
        """The batch file of one run, `words` being those of its command, without launch.*."""
        head = self._head(f"A run of hqqtrain {self._where()}.", "%j", self._use("sbatch"))
        return _text(*head, f"words=({shlex.join(words)})\n", _end())

    def sweep(self, runs: Sequence[Sequence[str]], words: Sequence[str]) -> str:
        """The batch file of an array of such runs, `launch.max_parallel_jobs` of them at a time; `words` are
        those of the sweep, without launch.*."""
        title = f"A sweep of hqqtrain: {len(runs)} runs, each {self._where()}."
        array = f"--array=0-{len(runs) - 1}%{self.launch.max_parallel_jobs}"
        cases = [f"  {n}) words=({shlex.join(words)}) ;;" for n, words in enumerate(runs)]
        choice = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "  *) exit 2 ;;", "esac\n"]
        call = _one_line(shlex.join(words))
        table = f"# Their table, at any time: python -m hqqtrain --table {call}"
        head = self._head(title, "%A_%a", f"{self._use('sbatch')}\n{table}", array)
        return _text(*head, *choice, _end())

    def table(self, words: Sequence[str]) -> str:
        """The batch file of what follows a sweep, on one core: its table."""
        options = [option for option in self.launch.options if not _asks_for_resources(option)]
        alone = replace(
            self.launch, nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=1,
            options=options,
        )  # fmt: skip
        job = replace(self, name=f"{self.name}-table", launch=alone)
        use = self._use("sbatch --dependency=afterany:JOB") + ", JOB being that of the runs"
        call = f'exec "$python" -m hqqtrain --table {shlex.join(words)}'
        return _text(*job._head("The table of a sweep of hqqtrain.", "%j", use), call)

    def _where(self) -> str:
        launch = self.launch
        nodes = f"{launch.nodes} nodes" if launch.nodes > 1 else "one node"
        return f"on {nodes}, with {launch.tasks} process{'es' if launch.tasks > 1 else ''} on each"

    def _use(self, sbatch: str) -> str:
        there = shlex.quote(str(self.folder))
        return f"# To use it, in the folder that was typed in: mkdir -p {there} && {sbatch} FILE"

    def _head(self, title: str, number: str, use: str, *more: str) -> Iterator[str]:
        yield "#!/usr/bin/env bash"
        yield f"# {title} Made by"
        yield f"#   {_one_line(self.command)}"
        yield use
        output = str(self.folder / f"{self.name}-").replace("%", "%%") + f"{number}.out"
        for option in (f"--job-name={self.name}", f"--output={output}", *self._asked_for(), *more):
            yield f"#SBATCH {shlex.quote(option)}"
        yield from (f"#SBATCH {option}" for option in self.launch.options)
        yield from ("set -e", *self.launch.setup, _THREADS, f"python={shlex.quote(self.python)}")

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


def _asks_for_resources(option: str) -> bool:
    """Whether sbatch's `option` asks for more than one core: those are the runs' own."""
    name = re.split("[= ]", option)[0]
    return bool(_RESOURCES.fullmatch(name.removeprefix("--"))) or name in _SHORT_RESOURCES


def _one_line(text: str) -> str:
    """For a comment, out of which a word must not break."""
    return " ".join(text.splitlines())


def _end() -> str:
    return _END.read_text(encoding="utf-8").rstrip()


def _text(*lines: str) -> str:
    return "\n".join(lines) + "\n"
