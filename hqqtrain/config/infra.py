"""The config groups that control how and where a run executes.

The result does not depend on them, so they do not change a run's name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

from hqqtrain.config.field import key

TRACKERS = ("wandb", "tensorboard")

_DURATION = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")
"""Matches [days-]hours:minutes:seconds, the forms that YAML and Slurm read alike."""


_MAX_NAME_BYTES = 200
"""Bytes of run.name; the names of a run's own files append to it."""


@dataclass(kw_only=True, slots=True)
class TrackConfig:
    """The trackers that receive metrics during a run."""

    backends: list[str] = key(
        help="trackers in addition to metrics.jsonl: wandb, tensorboard", factory=lambda: ["wandb"]
    )
    project: str = key("hqqtrain", "W&B project")
    entity: str | None = key(None, "W&B entity")
    group: str | None = key(
        None, "W&B group; null: the name of the sweep, if the run is part of one"
    )
    artifacts: bool = key(False, "upload the adapter to W&B as an artifact")

    def errors(self) -> Iterator[str]:
        """Yield one message for every value that is not allowed."""
        for name in self.backends:
            if name not in TRACKERS:
                yield (
                    f"track.backends=[{name}]: allowed are {', '.join(TRACKERS)}; metrics.jsonl is "
                    "always written."
                )

    def combination_errors(self) -> Iterator[str]:
        """Yield a message if artifacts have no tracker that stores them."""
        if self.artifacts and "wandb" not in self.backends:
            yield (
                "track.artifacts=true: only W&B stores artifacts; add wandb to track.backends, or "
                "use false."
            )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """The checkpoints from which a later process can resume training."""

    every: int | None = key(
        100,
        "optimizer steps between checkpoints; null: only at the end and on preemption",
        low=1,
    )
    keep_last: int = key(2, "number of latest checkpoints to keep", low=1)
    keep_best: int = key(
        0,
        "number of checkpoints with the lowest eval/loss to keep as well; above 0, every "
        "evaluation saves one",
        low=0,
    )
    load_best: bool = key(
        False,
        "at the end, return to the checkpoint with the lowest eval/loss, which becomes the result",
    )

    @property
    def num_best(self) -> int:
        """Number of checkpoints with the lowest eval/loss to keep; `load_best` needs one."""
        return max(self.keep_best, int(self.load_best))


@dataclass(kw_only=True, slots=True)
class RunDirConfig:
    """The directory of a run, its name, and how it resumes."""

    root: str = key("runs", "folder that contains all runs")
    name: str | None = key(
        None,
        "name of the run's directory; null: the recipe and a hash of the keys that define the "
        "result",
    )
    resume: str = key(
        "auto",
        "whether to resume from the last checkpoint; auto: if there is one, never: start from "
        "scratch, must: fail if there is none",
        choices=("auto", "never", "must"),
    )
    time_limit: str | None = key(
        None,
        "time after which the run saves and ends, as H:MM:SS or D-HH:MM:SS; null: Slurm's limit, "
        "if any",
    )

    def errors(self) -> Iterator[str]:
        """Yield one message for every value that is not allowed."""
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]*", self.name):
            yield f"run.name={self.name}: must consist of letters, digits and _ . + -; no folders."
        if self.name is not None and len(self.name.encode()) > _MAX_NAME_BYTES:
            yield (
                f"run.name={self.name[:40]}...: has {len(self.name.encode())} bytes; must have at "
                f"most {_MAX_NAME_BYTES}, because a file system allows 255 in the name of a file."
            )
        yield from _control_character_errors("run.root", self.root)
        yield from duration_errors("run.time_limit", self.time_limit)


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """How the processes are started; the keys after `max_parallel_jobs` are for Slurm."""

    backend: str = key(
        "local",
        "where to run; local: the processes that were started here, slurm: submit a batch job",
        choices=("local", "slurm"),
    )
    max_parallel_jobs: int = key(1, "jobs of a sweep that run at the same time", low=1)
    nodes: int = key(1, "number of nodes", low=1)
    gpus_per_node: int = key(0, "GPUs per node; 0: request none", low=0)
    tasks_per_node: int | None = key(
        None, "processes per node; null: one per GPU, or a single one without GPUs", low=1
    )
    cpus_per_task: int | None = key(
        None, "CPU cores per process; null: the cluster's default", low=1
    )
    time: str | None = key(
        None, "time limit of the job, as H:MM:SS or D-HH:MM:SS; null: the cluster's default"
    )
    grace: int = key(
        120, "seconds before the time limit at which Slurm signals the job to save and stop", low=10
    )
    partition: str | None = key(None, "Slurm partition; null: the cluster's default")
    account: str | None = key(None, "Slurm account; null: the cluster's default")
    options: list[str] = key(help="additional sbatch options, such as --qos=low", factory=list)
    setup: list[str] = key(
        help="shell commands to run before hqqtrain, such as module load cuda", factory=list
    )
    dry_run: bool = key(False, "print the batch script instead of submitting it")

    @property
    def processes_per_node(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def errors(self) -> Iterator[str]:
        """Yield one message for every value that is not allowed."""
        yield from duration_errors("launch.time", self.time)
        for name in ("partition", "account"):
            yield from _control_character_errors(f"launch.{name}", getattr(self, name) or "")
        for option in self.options:
            yield from _control_character_errors("launch.options", option)
            if not re.fullmatch(r"--[a-z][\w-]*(=.*)?|-[A-Za-z]( .*)?", option, re.DOTALL):
                yield f"launch.options=[{option}]: must be an option of sbatch, such as --qos=low."

    def combination_errors(self) -> Iterator[str]:
        """Yield one message for every combination of values that is not allowed."""
        if self.backend == "local":
            yield from self._slurm_only_errors()
        is_readable = not any(duration_errors("launch.time", self.time))
        if self.time and is_readable and parse_seconds(self.time) <= self.grace:
            yield f"launch.grace={self.grace}: must be shorter than launch.time={self.time}."
        if self.gpus_per_node and self.processes_per_node != self.gpus_per_node:
            yield (
                f"launch.tasks_per_node={self.processes_per_node}: must be one process for each of "
                f"launch.gpus_per_node={self.gpus_per_node}; leave it null."
            )

    def _slurm_only_errors(self) -> Iterator[str]:
        """Refuse keys that have no effect without Slurm, because none is ignored silently."""
        default = LaunchConfig(max_parallel_jobs=self.max_parallel_jobs)
        for item in fields(self):
            if (value := getattr(self, item.name)) != getattr(default, item.name):
                yield f"launch.{item.name}={value}: only applies to Slurm; add launch=slurm."


def parse_seconds(text: str) -> int:
    """Convert `4:00:00` or `1-12:00:00` (days-hours:minutes:seconds) to seconds.

    The caller must have checked the form with `duration_errors`.
    """
    match = _DURATION.fullmatch(text)
    assert match, text
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def duration_errors(where: str, text: str | None) -> Iterator[str]:
    """Yield one message if `text` is neither None nor a duration that `parse_seconds` accepts.

    Bare numbers are refused: Slurm reads them as minutes, and YAML turns an unquoted 4:00:00 into
    a number.

    Args:
        where: The key, with which the message begins.
        text: The value of the key.
    """
    if text is not None and not _DURATION.fullmatch(text):
        allowed = "hours:minutes:seconds, such as 4:00:00, or days-hours:minutes:seconds"
        yield f"{where}={text}: must be {allowed}; in a recipe, put it in quotes."


def _control_character_errors(where: str, text: str) -> Iterator[str]:
    """Refuse characters that would end a line of the batch script and start another.

    NUL is refused in every key.
    """
    if re.search(r"[\x01-\x1f\x7f-\x9f\u2028\u2029]", text):
        yield f"{where}={text!r}: must not contain line breaks or other control characters."
