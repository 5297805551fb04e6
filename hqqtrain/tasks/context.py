"""The context of a task: everything that is settled before the task begins."""

from dataclasses import dataclass

from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.tasks.recorder import RunRecorder


@dataclass(frozen=True)
class Run:
    """One run of one task.

    Attributes:
        config: The resolved configuration.
        runtime: Ranks, device, precision and strategy.
        recorder: Writes the run directory, logs the metrics and draws the progress bars.
    """

    config: RunConfig
    runtime: Runtime
    recorder: RunRecorder

    @property
    def layout(self) -> RunLayout:
        """The paths of the run directory."""
        return self.recorder.directory.layout
