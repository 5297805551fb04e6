"""Compose the overrides of a command line into one run or the jobs of a sweep, and show them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import yaml

from hqqtrain.common.errors import ErrorCollector, UserError
from hqqtrain.common.text import count
from hqqtrain.compose import run_settings
from hqqtrain.compose.compose import parse_overrides
from hqqtrain.compose.expand import expand_jobs
from hqqtrain.compose.job import Job
from hqqtrain.config.run import RunConfig
from hqqtrain.config.unused import unused_settings


@dataclass(frozen=True)
class Command:
    """The jobs of a command, all composed and validated before the first one starts."""

    jobs: list[Job]
    is_sweep: bool

    @property
    def is_slurm(self) -> bool:
        jobs = (job.config for job in self.jobs)
        return any(config.launch.backend == "slurm" and config.task != "plan" for config in jobs)

    def as_recipes(self) -> str:
        """Return the complete configuration of every job as YAML.

        A document that is saved under ./recipes is a valid recipe.
        """
        return "---\n".join(_as_recipe(job.config) for job in self.jobs).rstrip()

    def notes(self) -> Iterator[str]:
        """Yield what the user should know about a single run before it starts.

        The jobs of a sweep are commands of their own, which have their own notes.
        """
        if self.is_sweep:
            return
        job = self.jobs[0]
        values = {o.key_or_group: o.value() for o in parse_overrides(job.overrides)}
        given, config = {*values}, job.config
        run = run_settings.run_of(config) if config.task in run_settings.TASKS else None
        named = str(values.get("model.name_or_path"))
        if run and config.task == "generate" and named != config.model.name_or_path:
            # The settings of the training have selected the run, so all of them are used.
            yield f"task=generate: uses {run.folder}, which the same settings have trained."
            given = {key for key in given if key.split(".")[0] == "generate"}
        elif not run and config.task == "generate" and config.quant.nbits is None:
            yield (
                f"task=generate: uses {config.model.name_or_path} as it is; a key of quant, such "
                "as quant.nbits=4, quantizes it."
            )
        elif run:
            yield (
                f"task={config.task}: starts from the settings of {run.config_yaml}; the command "
                "line overrides them."
            )
            if changed := run_settings.settings_of_recipe(run, config, given):
                yield (
                    f"warning: recipe={config.recipe}: replaces settings of the run: "
                    f"{', '.join(changed)}. Leave the recipe out to keep those of the run."
                )
            if config.task == "eval":
                yield from (f"warning: {m}" for m in run_settings.held_out_warnings(run, config))
        of_model = run_settings.settings_of_packed_model(config, sorted(given))
        unused = list(unused_settings(config, sorted(given - {*of_model})))
        unused += [
            f"{key}: is not used, because model.name_or_path={config.model.name_or_path} is "
            "quantized already and keeps its settings."
            for key in of_model
        ]
        yield from (f"warning: {message}" for message in unused)

    def describe_directories(self) -> str:
        """Return the directory that the run would write to.

        A task without one gets a sentence. A sweep gets a title and a line per job. A single run on
        Slurm gets a title as well, because launch.sh reads from the title that it must not start
        several processes.
        """
        if not self.jobs[0].config.has_run_directory:
            return f"task={self.jobs[0].config.task} writes no run directory"
        if not self.is_sweep:
            return ("slurm job:\n" if self.is_slurm else "") + str(self.jobs[0].folder)
        title = f"sweep of {count(len(self.jobs), 'job')}:"
        return "\n".join([title, *(f"{job.folder}  {job}" for job in self.jobs)])


def compose_command(overrides: list[str], multirun: bool) -> Command:
    """Compose and check the run or the sweep that a command line describes.

    Args:
        overrides: the `key=value` arguments of the command line.
        multirun: whether `-m` was given.

    Returns:
        The composed jobs. A recipe with a `sweep` group is a sweep even without `-m`.

    Raises:
        UserError: an override is invalid, or two different jobs would share a run directory.
    """
    expanded = expand_jobs(overrides, multirun)
    jobs, errors = [], ErrorCollector()
    for job_overrides, composed in expanded:
        with errors.collect():
            jobs.append(Job(job_overrides, composed.checked()))
    errors.raise_if_any()
    _refuse_shared_folders(jobs)
    _refuse_shared_repositories(jobs)
    # Without a sweep, the only job has the overrides of the command line unchanged.
    is_sweep = multirun or [job.overrides for job in jobs] != [overrides]
    if not is_sweep:
        _refuse_parallel_jobs(overrides)
    elif not jobs[0].config.has_run_directory:
        raise UserError(
            f"task={jobs[0].config.task}: cannot be swept, because its jobs have no directories; "
            "choose one value of each key."
        )
    return Command(jobs, is_sweep)


def _as_recipe(config: RunConfig) -> str:
    values = asdict(config)
    # A recipe must not set `recipe`; its first line is the comment that --help shows.
    title = f"# Everything that {values.pop('recipe') or 'the command line'} sets.\n"
    return title + yaml.safe_dump(values, sort_keys=False)


def _refuse_parallel_jobs(overrides: Sequence[str]) -> None:
    """Refuse `launch.max_parallel_jobs` for a single run; a recipe may set it for sweeps."""
    for override in overrides:
        if override.startswith("launch.max_parallel_jobs="):
            raise UserError(
                f"{override}: sets how many jobs of a sweep run in parallel, but this is one run; "
                "leave it out, or start a sweep, as in -m quant.nbits=2,3."
            )


def _refuse_shared_folders(jobs: list[Job]) -> None:
    """Refuse jobs that differ in their results and would share a run directory."""
    identities: dict[str, str] = {}  # folder -> identity of the first job in it
    for job in jobs:
        identity = job.config.identity()
        if identities.setdefault(str(job.folder), identity) != identity:
            raise UserError(
                f"run.name={job.config.run.name}: every job of a sweep needs its own folder; use "
                "run.name=null, which derives a name from the settings that define the result."
            )


def _refuse_shared_repositories(jobs: list[Job]) -> None:
    """Refuse different jobs of a sweep that would push their results to one repository."""
    identities: dict[str, str] = {}  # repository -> identity of the first job that pushes to it
    for job in jobs:
        name, identity = job.config.hub.push, job.config.identity()
        if name and identities.setdefault(name, identity) != identity:
            raise UserError(
                f"hub.push={name}: every job of a sweep would push its result to this repository; "
                "leave it out, and push the best run afterwards by its own command with hub.push."
            )
