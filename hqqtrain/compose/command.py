"""What the words of a command line stand for, one run or the jobs of a sweep; and shows it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.expand import expand_jobs
from hqqtrain.compose.job import Job
from hqqtrain.config.run import RunConfig


@dataclass(frozen=True)
class Command:
    """The jobs, all of them composed and checked before the first one starts."""

    jobs: list[Job]
    is_sweep: bool

    @property
    def is_slurm(self) -> bool:
        return any(job.config.launch.backend == "slurm" for job in self.jobs)

    def as_recipes(self) -> str:
        """The whole configuration of each as YAML; saved under ./recipes it is a recipe."""
        return "---\n".join(_as_recipe(job.config) for job in self.jobs).rstrip()

    def directories(self) -> str:
        """Where the run would write; for a sweep, or for slurm, a title, then a line per job."""
        if not self.is_sweep:
            return ("job of slurm:\n" if self.is_slurm else "") + str(self.jobs[0].folder)
        title = f"sweep of {len(self.jobs)} jobs:"
        return "\n".join([title, *(f"{job.folder}  {job}" for job in self.jobs)])


def plan_command(overrides: list[str], multirun: bool) -> Command:
    """The plan of `overrides`, `multirun` being `-m`. Raises UserError for whatever is wrong."""
    lines = expand_jobs(overrides, multirun)
    planned = [Job(line, compose_config(line)) for line in lines]
    _refuse_shared_folders(planned)
    is_sweep = multirun or lines != [overrides]
    if not is_sweep:
        _refuse_jobs(overrides)
    return Command(planned, is_sweep)


def _as_recipe(config: RunConfig) -> str:
    keys = asdict(config)
    title = f"# Everything that {keys.pop('recipe') or 'the command line'} sets.\n"
    return title + yaml.safe_dump(keys, sort_keys=False)


def _refuse_jobs(words: Sequence[str]) -> None:
    """A recipe may say it for the sweeps that it is made for; a command line says it in vain."""
    for word in words:
        if word.startswith("launch.max_parallel_jobs="):
            raise UserError(
                f"{word}: so many jobs of a sweep run at a time, and this is one run; leave it "
                "out, or sweep, as in -m quant.nbits=2,3."
            )


def _refuse_shared_folders(planned: list[Job]) -> None:
    owners: dict[str, str] = {}
    for job in planned:
        if owners.setdefault(str(job.folder), job.config.identity()) != job.config.identity():
            raise UserError(
                f"run.name={job.config.run.name}: the jobs of a sweep need a folder each; leave "
                "run.name=null, which names each by what defines its result."
            )
