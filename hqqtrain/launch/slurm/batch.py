"""Render Slurm batch files: the requested resources, then the command, then the requeue logic.

A batch file is self-contained: a user can read, keep, edit and submit it by hand. It ends with the
text of job.sh, which is the same for every run.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hqqtrain.config.infra import LaunchConfig

_JOB_SCRIPT = Path(__file__).with_name("job.sh")

_RESOURCE_OPTIONS = re.compile(
    "gres.*|(gpu|cpu|mem|tres|ntasks|cores|sockets|threads)[s-].*|mem|ntasks|mincpus|nodes|nodelist"
    "|nodefile|exclusive|oversubscribe|overcommit|constraint|cluster-constraint|prefer|contiguous"
    "|switches|tmp|licenses|bb|bbf|distribution|extra-node-info|hint|core-spec|thread-spec"
    "|use-min-nodes|spread-job|array"
)
"""Names of sbatch options that request resources, without the leading dashes."""

_SHORT_RESOURCE_OPTIONS = frozenset(f"-{letter}" for letter in "BCFGLNOSacmnsw")

_SET_THREADS = 'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"'
"""Shell command: one thread per core of the process. The user's own value comes first."""


@dataclass(frozen=True)
class BatchScript:
    """Renders the batch files of one command.

    Args:
        name: the name of the job.
        folder: the folder for the job's output.
        launch: the resources to request.
        command: the command that the user typed; it becomes a comment of the file.
        python: the interpreter, at the same path on every node.
    """

    name: str
    folder: Path
    launch: LaunchConfig
    command: str
    python: str

    def render_run(self, overrides: Sequence[str]) -> str:
        """Return the batch file of one run, given its overrides without `launch.*`."""
        title = f"A run of hqqtrain {self._processes_text()}."
        header = self._header(title, "%j", self._usage("sbatch"))
        return _join_lines(*header, f"words=({shlex.join(overrides)})\n", _job_script())

    def render_sweep(self, runs: Sequence[Sequence[str]], arguments: Sequence[str]) -> str:
        """Return the batch file of a job array, with `launch.max_parallel_jobs` tasks in parallel.

        Args:
            runs: the overrides of every run, without `launch.*`.
            arguments: the arguments of the sweep's own command, without `launch.*`.
        """
        title = f"A sweep of hqqtrain: {len(runs)} runs, each {self._processes_text()}."
        array = f"--array=0-{len(runs) - 1}%{self.launch.max_parallel_jobs}"
        cases = [f"  {n}) words=({shlex.join(run)}) ;;" for n, run in enumerate(runs)]
        case_statement = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "  *) exit 2 ;;", "esac\n"]
        sweep = _one_line(shlex.join(arguments))
        table_hint = f"# To print the table at any time: python -m hqqtrain --table {sweep}"
        header = self._header(title, "%A_%a", f"{self._usage('sbatch')}\n{table_hint}", array)
        return _join_lines(*header, *case_statement, _job_script())

    def render_table(self, arguments: Sequence[str]) -> str:
        """Return the batch file of the job that writes the sweep's table, on a single core."""
        options = [option for option in self.launch.options if not _requests_resources(option)]
        launch = replace(
            self.launch,
            nodes=1,
            tasks_per_node=1,
            gpus_per_node=0,
            cpus_per_task=1,
            options=options,
        )
        job = replace(self, name=f"{self.name}-table", launch=launch)
        usage = self._usage("sbatch --dependency=afterany:JOB") + ", where JOB is the job array"
        command = f'exec "$python" -m hqqtrain --table {shlex.join(arguments)}'
        header = job._header("The table of a sweep of hqqtrain.", "%j", usage)
        return _join_lines(*header, command)

    def _processes_text(self) -> str:
        """Return, for example, `on 2 nodes, with 8 processes on each`."""
        nodes, processes = self.launch.nodes, self.launch.processes_per_node
        where = f"{nodes} nodes" if nodes > 1 else "one node"
        return f"on {where}, with {processes} process{'es' if processes > 1 else ''} on each"

    def _usage(self, sbatch: str) -> str:
        """Return the comment that says how to submit the file with the command `sbatch`."""
        folder = shlex.quote(str(self.folder))
        return f"# To submit it from the folder of that command: mkdir -p {folder} && {sbatch} FILE"

    def _header(self, title: str, job_pattern: str, usage: str, *options: str) -> Iterator[str]:
        """Yield the lines up to the command: comments, sbatch options, and the environment.

        Args:
            title: the first comment of the file.
            job_pattern: sbatch's pattern for the job id in the name of the output file.
            usage: a comment that says how to submit the file.
            options: further options of sbatch.
        """
        yield "#!/usr/bin/env bash"
        yield f"# {title} Generated by"
        yield f"#   {_one_line(self.command)}"
        yield usage
        # sbatch expands %; a literal one is doubled.
        output = str(self.folder / f"{self.name}-").replace("%", "%%") + f"{job_pattern}.out"
        names = (f"--job-name={self.name}", f"--output={output}")
        for option in (*names, *self._resource_options(), *options):
            yield f"#SBATCH {shlex.quote(option)}"
        yield from (f"#SBATCH {option}" for option in self.launch.options)
        yield "set -e"
        yield from self.launch.setup
        yield from (_SET_THREADS, f"python={shlex.quote(self.python)}")

    def _resource_options(self) -> Iterator[str]:
        """Yield the sbatch options for resources and for preemption.

        `--signal` has no `B:` prefix, so that USR1 goes to the ranks and not to the shell.
        """
        launch = self.launch
        yield f"--nodes={launch.nodes}"
        yield f"--ntasks-per-node={launch.processes_per_node}"
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


def _requests_resources(option: str) -> bool:
    """Whether an sbatch option requests resources, which the runs need and the table does not."""
    name = re.split("[= ]", option)[0]
    is_long = bool(_RESOURCE_OPTIONS.fullmatch(name.removeprefix("--")))
    return is_long or name in _SHORT_RESOURCE_OPTIONS


def _one_line(text: str) -> str:
    """Join the lines of `text`, so that it cannot break out of a comment."""
    return " ".join(text.splitlines())


def _job_script() -> str:
    return _JOB_SCRIPT.read_text(encoding="utf-8").rstrip()


def _join_lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"
