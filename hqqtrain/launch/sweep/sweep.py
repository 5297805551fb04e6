"""The jobs of a sweep and what they share: a folder, a cache of quantized weights, a W&B group."""

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.compose.job import Job


@dataclass(frozen=True)
class Sweep:
    """Jobs that each have a run directory, and the sweep's own folder next to those directories."""

    name: str
    jobs: list[Job]
    duplicates: list[Job]
    """Jobs with the run directory of an earlier job, which runs in their place."""

    @classmethod
    def from_jobs(cls, jobs: Sequence[Job]) -> "Sweep":
        """Build a sweep from its jobs.

        A job with the run directory of an earlier one is moved to `duplicates`. The name of the
        sweep is derived from the jobs. Every job gets overrides for a shared `quant.cache_dir`, so
        that weights of one setting are quantized only once, and for a shared `track.group`. An
        override is omitted if the user or the recipe has set its key.
        """
        by_folder: dict[Path, Job] = {}
        for job in jobs:
            by_folder.setdefault(job.folder, job)
        duplicates = [job for job in jobs if by_folder[job.folder] is not job]
        unique = list(by_folder.values())
        name = _sweep_name(unique)
        unique = [replace(job, shared_overrides=_shared_overrides(job, name)) for job in unique]
        return cls(name, unique, duplicates)

    @property
    def folder(self) -> Path:
        return Path(self.jobs[0].config.run.root).expanduser() / self.name

    @property
    def num_parallel_jobs(self) -> int:
        """Number of jobs that run in parallel."""
        return min(self.jobs[0].config.launch.max_parallel_jobs, len(self.jobs))

    def log_file(self, job: Job) -> Path:
        """The log file of `job`, used when several jobs run in parallel."""
        return self.folder / "logs" / f"{job.name}.log"

    @cached_property
    def swept_keys(self) -> list[str]:
        """The configuration keys whose values differ between the jobs."""
        return _differing_keys(self.jobs)

    def swept_values(self, job: Job) -> dict[str, str]:
        """Return the values of the swept keys for `job`, with secrets masked."""
        return _masked_values(job, self.swept_keys)

    def label(self, job: Job) -> str:
        """Return the overrides that distinguish `job` from all others, duplicates included.

        For example `quant.nbits=2 optim.lr=0.1`. A sweep of one job returns the job's name.
        """
        values = _masked_values(job, _differing_keys([*self.jobs, *self.duplicates]))
        return shlex.join(f"{key}={value}" for key, value in values.items()) or job.name


def _sweep_name(jobs: Sequence[Job]) -> str:
    """Return `sweep-RECIPE-HASH`, or `sweep-TASK-HASH` without a common recipe.

    The hash covers the identities of the jobs, so repeating a sweep finds its folder again.
    """
    recipes = {job.config.recipe for job in jobs}
    common_recipe = recipes.pop() if len(recipes) == 1 else None
    identities = "\n".join(sorted(f"{job.name} {job.config.identity()}" for job in jobs))
    digest = hashlib.sha256(identities.encode()).hexdigest()[:8]
    return f"sweep-{common_recipe or jobs[0].config.task}-{digest}"


def _shared_overrides(job: Job, name: str) -> tuple[str, ...]:
    """Return the overrides that all jobs of sweep `name` share, except for keys that are set."""
    config, given = job.config, _values_by_key(job)
    overrides = []
    quantizes = config.task != "data" and config.quant.quantizes
    if quantizes and config.quant.cache_dir is None and "quant.cache_dir" not in given:
        cache_dir = str(Path(config.run.root) / "quantized")
        overrides.append(f"quant.cache_dir={_quote_value(cache_dir)}")
    is_tracked = config.task == "finetune"  # the other tasks use no trackers
    if is_tracked and config.track.group is None and "track.group" not in given:
        overrides.append(f"track.group={_quote_value(name)}")
    return tuple(overrides)


def _differing_keys(jobs: Sequence[Job]) -> list[str]:
    """Return the keys whose overrides differ between the jobs, in the order of first use."""
    values_of_jobs = [_values_by_key(job) for job in jobs]
    keys = dict.fromkeys(key for values in values_of_jobs for key in values)
    return [key for key in keys if len({values.get(key) for values in values_of_jobs}) > 1]


def _masked_values(job: Job, keys: Sequence[str]) -> dict[str, str]:
    """Return the values of `keys` for `job`, with secrets masked; empty where one is not set."""
    given = _values_by_key(job)
    return {key: mask_secrets(_unescape_value(given.get(key, "")), key) for key in keys}


def _unescape_value(value: str) -> str:
    """Remove the escapes of a sweep's value, so that secrets in it are recognized."""
    return value if value[:1] in ("'", '"') else re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", value)


def _values_by_key(job: Job) -> dict[str, str]:
    """Return key -> value of the job's overrides; the last one wins if a key occurs twice."""
    pairs = (override.partition("=") for override in job.overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def _quote_value(text: str) -> str:
    """Quote `text` as the value of an override, because Hydra's grammar has special characters."""
    if re.fullmatch(r"[\w./-]*[A-Za-z/][\w./-]*", text, re.ASCII):
        return text
    # Escape each quote. Backslashes before a quote are doubled, because Hydra unescapes them there.
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", text) + "'"
