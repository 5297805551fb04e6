"""The config groups that say how a run runs. A result does not depend on them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

from hqqtrain.common.durations import duration_error, parse_seconds
from hqqtrain.config.field import key

TRACKERS = ("wandb", "tensorboard")


@dataclass(kw_only=True, slots=True)
class TrackConfig:
    """Who hears of metrics while a run goes on."""

    backends: list[str] = key(
        help="beside metrics.jsonl: wandb, tensorboard", factory=lambda: ["wandb"]
    )
    project: str = key("hqqtrain", "W&B project")
    entity: str | None = key(None, "W&B entity")
    group: str | None = key(None, "W&B group; null: none, or the sweep that a run is part of")
    artifacts: bool = key(False, "give W&B the adapter as an artifact")

    def faults(self) -> Iterator[str]:
        for name in self.backends:
            if name not in TRACKERS:
                yield (
                    f"track.backends=[{name}]: allowed are {', '.join(TRACKERS)}; metrics.jsonl is "
                    "always written."
                )
        if self.artifacts and "wandb" not in self.backends:
            yield "track.artifacts=true: W&B keeps them; add wandb to track.backends, or use false."


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """The state of a training that a later process can go on from."""

    every: int | None = key(
        100, "steps between checkpoints; null: at the end, when preempted", low=1
    )
    keep_last: int = key(2, "checkpoints that are kept, the latest", low=1)
    keep_best: int = key(0, "also those with the lowest eval/loss, made when measured", low=0)


@dataclass(kw_only=True, slots=True)
class RunDirConfig:
    """Where a run writes, what it is called, and how it goes on."""

    root: str = key("runs", "folder of all runs")
    name: str | None = key(None, "null: the recipe and a hash of what defines the result")
    resume: str = key(
        "auto", "from the last checkpoint; auto: where there is one, never: begin anew",
        choices=("auto", "never", "must"),
    )  # fmt: skip
    time_limit: str | None = key(
        None, "H:MM:SS or D-HH:MM:SS after which a run saves and ends; null: slurm's, if any"
    )

    def faults(self) -> Iterator[str]:
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]*", self.name):
            yield f"run.name={self.name}: must be letters, digits and any of _ . + -, no folders."
        yield from _control_fault("run.root", self.root)
        yield from duration_error("run.time_limit", self.time_limit)


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """What starts the processes; the keys below `jobs` are slurm's."""

    backend: str = key(
        "local", "local: this machine, as started; slurm: a batch job", choices=("local", "slurm")
    )
    max_parallel_jobs: int = key(1, "jobs of a sweep that run at a time", low=1)
    nodes: int = key(1, "nodes of a job", low=1)
    gpus_per_node: int = key(0, "GPUs of a node; 0: ask for none", low=0)
    tasks_per_node: int | None = key(
        None, "processes of a node; null: one for each GPU, or one", low=1
    )
    cpus_per_task: int | None = key(None, "cores of a process; null: as the cluster has it", low=1)
    time: str | None = key(None, "H:MM:SS or D-HH:MM:SS; null: as the cluster has it")
    grace: int = key(120, "seconds before the end at which a job is told to save", low=10)
    partition: str | None = key(None, "slurm's partition; null: its default")
    account: str | None = key(None, "slurm's account; null: its default")
    options: list[str] = key(help="other options of sbatch, such as --qos=low", factory=list)
    setup: list[str] = key(help="shell lines before it, such as module load cuda", factory=list)
    dry_run: bool = key(False, "print the batch file instead of submitting it")

    @property
    def tasks(self) -> int:
        """Processes of a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def faults(self) -> Iterator[str]:
        yield from self._ignored()
        no_time = [*duration_error("launch.time", self.time)]
        yield from no_time
        if self.time and not no_time and parse_seconds(self.time) <= self.grace:
            yield f"launch.grace={self.grace}: must be shorter than launch.time={self.time}."
        if self.gpus_per_node and self.tasks != self.gpus_per_node:
            yield (
                f"launch.tasks_per_node={self.tasks}: one process for each of "
                f"launch.gpus_per_node={self.gpus_per_node}; leave it null."
            )
        for name in ("partition", "account"):
            yield from _word_fault(f"launch.{name}", getattr(self, name))
        for option in self.options:
            yield from _control_fault("launch.options", option)
            if not re.fullmatch(r"--[a-z][\w-]*(=.*)?|-[A-Za-z]( .*)?", option, re.DOTALL):
                yield f"launch.options=[{option}]: must be an option of sbatch, such as --qos=low."

    def _ignored(self) -> Iterator[str]:
        """Slurm's keys, set where the run is not given to slurm."""
        plain = LaunchConfig(max_parallel_jobs=self.max_parallel_jobs)
        for item in fields(self) if self.backend == plain.backend else ():
            if (value := getattr(self, item.name)) != getattr(plain, item.name):
                yield f"launch.{item.name}={value}: is for slurm; add launch=slurm."


def _word_fault(where: str, text: str | None) -> Iterator[str]:
    if text is not None and not text.strip():
        yield f"{where}={text}: is empty; name one, or use null for the cluster's default."
    yield from _control_fault(where, text or "")


def _control_fault(where: str, text: str) -> Iterator[str]:
    """In a batch file, a line break would begin a line of its own."""
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text):
        yield f"{where}={text!r}: must not hold line breaks or other control characters."
