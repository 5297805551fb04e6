"""What the jobs of a sweep have in common: a folder, quantized weights, and what is swept over."""

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
    """Jobs with a folder each, and the sweep's own beside them."""

    name: str
    jobs: list[Job]
    same: list[Job]
    """Jobs that mean the same as an earlier one, which does their work."""

    @classmethod
    def of(cls, planned: Sequence[Job]) -> "Sweep":
        """Names the sweep by what its jobs are, and gives them the words that they share.

        That is a folder for quantized weights, so that those of one setting are made once, and a
        W&B group. What the user or the recipe has set stays as it is.
        """
        first: dict[Path, Job] = {}
        for job in planned:
            first.setdefault(job.folder, job)
        same = [job for job in planned if first[job.folder] is not job]
        jobs, name = list(first.values()), _name(list(first.values()))
        return cls(name, [replace(job, shared=_shared(job, name)) for job in jobs], same)

    @property
    def folder(self) -> Path:
        return Path(self.jobs[0].config.run.root).expanduser() / self.name

    @property
    def at_a_time(self) -> int:
        return min(self.jobs[0].config.launch.max_parallel_jobs, len(self.jobs))

    def log(self, job: Job) -> Path:
        """Where a job's output goes when it is not alone at the terminal."""
        return self.folder / "logs" / f"{job.name}.log"

    @cached_property
    def swept(self) -> list[str]:
        """The keys whose values differ among the jobs."""
        return _differing(self.jobs)

    def values(self, job: Job) -> dict[str, str]:
        """What `job` has for the swept keys, as it may be shown."""
        return _shown(job, self.swept)

    def label(self, job: Job) -> str:
        """`quant.nbits=2 optim.lr=0.1`: the words that tell `job` from all others, `same` too."""
        told = _shown(job, _differing([*self.jobs, *self.same]))
        return shlex.join(f"{key}={value}" for key, value in told.items()) or job.name


def _name(jobs: Sequence[Job]) -> str:
    recipes = {job.config.recipe for job in jobs}
    what = (recipes.pop() if len(recipes) == 1 else None) or jobs[0].config.task
    identities = "\n".join(sorted(f"{job.name} {job.config.identity()}" for job in jobs))
    return f"sweep-{what}-{hashlib.sha256(identities.encode()).hexdigest()[:8]}"


def _shared(job: Job, name: str) -> tuple[str, ...]:
    config, given = job.config, _by_key(job)
    words = []
    if config.quant.cache_dir is None and "quant.cache_dir" not in given:
        words.append(f"quant.cache_dir={_quoted(str(Path(config.run.root) / 'quantized'))}")
    if config.track.group is None and "track.group" not in given:
        words.append(f"track.group={_quoted(name)}")
    return tuple(words)


def _differing(jobs: Sequence[Job]) -> list[str]:
    given = [_by_key(each) for each in jobs]
    keys = dict.fromkeys(key for words in given for key in words)
    return [key for key in keys if len({words.get(key) for words in given}) > 1]


def _shown(job: Job, keys: Sequence[str]) -> dict[str, str]:
    given = _by_key(job)
    return {key: mask_secrets(_plain(given.get(key, "")), key) for key in keys}


def _plain(value: str) -> str:
    """Without the escapes that a sweep's values get, so that secrets in them are known."""
    return value if value[:1] in ("'", '"') else re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", value)


def _by_key(job: Job) -> dict[str, str]:
    """Key -> value of its words; of a key given twice, the last counts."""
    parts = (word.partition("=") for word in job.words)
    return {key.lstrip("+"): value for key, _, value in parts}


def _quoted(text: str) -> str:
    """`text` as a value of a command line's word, whose grammar gives a meaning to some signs."""
    if re.fullmatch(r"[\w./-]*[A-Za-z/][\w./-]*", text, re.ASCII):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", text) + "'"
