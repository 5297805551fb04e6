"""Turns the overrides of a command line into one run or the jobs of a sweep, and shows them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.compose.expand import expand_jobs
from hqqtrain.compose.job import Job
from hqqtrain.config.run import RunConfig


@dataclass(frozen=True)
class Command:
    """The jobs of a command, all composed and validated before the first one starts."""

    jobs: list[Job]
    is_sweep: bool

    @property
    def is_slurm(self) -> bool:
        return any(job.config.launch.backend == "slurm" for job in self.jobs)

    def as_recipes(self) -> str:
        """Return the complete configuration of every job as YAML.

        A document that is saved under ./recipes is a valid recipe.
        """
        return "---\n".join(_as_recipe(job.config) for job in self.jobs).rstrip()

    def describe_directories(self) -> str:
        """Return the directory that the run would write to.

        A sweep gets a title and a line per job. A single run on Slurm gets a title as well.
        """
        if not self.is_sweep:
            return ("slurm job:\n" if self.is_slurm else "") + str(self.jobs[0].folder)
        title = f"sweep of {len(self.jobs)} jobs:"
        return "\n".join([title, *(f"{job.folder}  {job}" for job in self.jobs)])


def plan_command(overrides: list[str], multirun: bool) -> Command:
    """Plan the run or the sweep that a command line describes.

    Args:
        overrides: the `key=value` arguments of the command line.
        multirun: whether `-m` was given.

    Returns:
        The composed jobs. A recipe with a `sweep` group is a sweep even without `-m`.

    Raises:
        UserError: an override is invalid, or two different jobs would share a run directory.
    """
    expanded = expand_jobs(overrides, multirun)
    planned = [Job(words, composed.checked()) for words, composed in expanded]
    _refuse_shared_folders(planned)
    is_sweep = multirun or [words for words, _ in expanded] != [overrides]
    if not is_sweep:
        _refuse_jobs(overrides)
    return Command(planned, is_sweep)


def _as_recipe(config: RunConfig) -> str:
    values = asdict(config)
    title = f"# Everything that {values.pop('recipe') or 'the command line'} sets.\n"
    return title + yaml.safe_dump(values, sort_keys=False)


def _refuse_jobs(words: Sequence[str]) -> None:
    """Refuse `launch.max_parallel_jobs` for a single run; a recipe may set it for sweeps."""
    for word in words:
        if word.startswith("launch.max_parallel_jobs="):
            raise UserError(
                f"{word}: sets how many jobs of a sweep run in parallel, but this is one run; "
                "leave it out, or start a sweep, as in -m quant.nbits=2,3."
            )


def _refuse_shared_folders(planned: list[Job]) -> None:
    owners: dict[str, str] = {}
    for job in planned:
        if owners.setdefault(str(job.folder), job.config.identity()) != job.config.identity():
            raise UserError(
                f"run.name={job.config.run.name}: every job of a sweep needs its own folder; use "
                "run.name=null, which derives a name from the settings that define the result."
            )
