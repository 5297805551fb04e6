"""One run of a command: the overrides that start it, and the results it has written so far."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.common.secrets import mask_command
from hqqtrain.config.run import RunConfig
from hqqtrain.rundir import schema
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import Status, Summary


@dataclass(frozen=True)
class Job:
    """A single run, or one of a sweep: its overrides and the configuration that they compose."""

    overrides: list[str]
    config: RunConfig
    shared_overrides: tuple[str, ...] = ()
    """Overrides that the sweep adds, see `Sweep.from_jobs`."""

    @property
    def name(self) -> str:
        return self.config.run_name()

    @property
    def folder(self) -> Path:
        """The run directory. Two jobs share one only if their configurations are the same."""
        return Path(self.config.run.root).expanduser() / self.name

    @property
    def arguments(self) -> list[str]:
        """All arguments of `python -m hqqtrain` for this job.

        `launch.max_parallel_jobs` is left out, because it belongs to the sweep and not to a
        single run.
        """
        kept = [o for o in self.overrides if not o.startswith("launch.max_parallel_jobs=")]
        return [*kept, *self.shared_overrides]

    def __str__(self) -> str:
        """The overrides as the user wrote them, with secrets masked."""
        return shlex.join(mask_command(self.overrides))

    @property
    def layout(self) -> RunLayout:
        """The paths of the run directory."""
        return RunLayout(self.folder)

    def read_status(self) -> Status:
        """Return the content of status.json; an empty `Status` if there is none."""
        return schema.read_status(self.layout.status_json)

    def read_summary(self) -> Summary:
        """Return the content of summary.json; an empty `Summary` if there is none."""
        return schema.read_summary(self.layout.summary_json)

    def format_metrics(self) -> str:
        """Format the main metrics that are known so far; an empty string if none is.

        For example `: 2.50 bits per weight, perplexity 9.100 quantized, perplexity 6.320 trained`.
        """
        summary = self.read_summary()
        bits = summary.quantize and summary.quantize.bits_per_weight
        parts = [] if bits is None else [f"{bits:.2f} bits per weight"]
        for name, metrics in summary.measured_models().items():
            if metrics.perplexity is not None:
                parts.append(f"perplexity {metrics.perplexity:.3f} {schema.MODEL_NAMES[name]}")
        return f": {', '.join(parts)}" if parts else ""

    def is_done(self) -> bool:
        """Whether the run has finished and nothing is left to do.

        Raises:
            UserError: the inputs of the finished run have changed since.
        """
        if self.read_status().status != "done":
            return False
        directory = RunDirectory(self.config)
        directory.check()
        return directory.is_finished_as_configured()
