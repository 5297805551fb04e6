"""Send every call to all trackers of a run, and keep their failures away from the run.

A metrics server that is down, or a full disk, must never stop the training. If a tracker raises an
exception, one warning reports it, and the tracker is disabled for the rest of the run.
"""

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.config.infra import TrackConfig
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import GLOBAL_STEP
from hqqtrain.tracking.base import Tracker
from hqqtrain.tracking.jsonl import JsonlTracker, read_metrics
from hqqtrain.tracking.tensorboard import TensorBoardTracker
from hqqtrain.tracking.wandb import WandbTracker

logger = logging.getLogger(__name__)


class CompositeTracker:
    """All trackers of a run. Its methods never raise an exception of a tracker.

    Attributes:
        active: the trackers that have not failed.
        already_logged: optimizer step -> names of the metrics that earlier processes of the run
            have logged for this step. `log` leaves them out. `open_trackers` sets it.
    """

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.active = list(trackers)
        self.already_logged: Mapping[int, Container[str]] = {}

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        self._call_each(lambda tracker: tracker.start(config, step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        already_logged = self.already_logged.get(step, ())
        new_metrics = {name: value for name, value in metrics.items() if name not in already_logged}
        if new_metrics:
            self._call_each(lambda tracker: tracker.log(new_metrics, step))

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        self._call_each(lambda tracker: tracker.log_summary(summary))

    @property
    def shows_images(self) -> bool:
        """Whether any tracker shows the images of `log_images`."""
        return any(tracker.shows_images for tracker in self.active)

    def log_images(self, paths: Mapping[str, Path]) -> None:
        self._call_each(lambda tracker: tracker.log_images(paths))

    def log_artifact(self, path: Path) -> None:
        self._call_each(lambda tracker: tracker.log_artifact(path))

    def hints(self) -> list[str]:
        """Return lines that tell the user how to view the run. Call this before `finish`."""
        hints: list[str | None] = []
        self._call_each(lambda tracker: hints.append(tracker.hint()))
        return [hint for hint in hints if hint]

    def finish(self, exit_code: int = 0) -> None:
        self._call_each(lambda tracker: tracker.finish(exit_code))
        self.active = []

    def _call_each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.active):
            try:
                call(tracker)
            except Exception as error:
                self.active.remove(tracker)
                logger.warning(
                    "%s failed and is disabled: %s",
                    type(tracker).__name__, mask_secrets(str(error)),
                )  # fmt: skip


def open_trackers(
    track: TrackConfig,
    run_dir: Path,
    config: Mapping[str, Any],
    step: int = 0,
    *,
    is_main: bool = True,
) -> CompositeTracker:
    """Start the trackers of a run: metrics.jsonl always, and those of `track.backends`.

    Args:
        track: the group `track` of the configuration.
        run_dir: the run directory.
        config: the whole resolved configuration, which the trackers log with secrets masked.
        step: the optimizer step that the run resumes from; 0 for a fresh run.
        is_main: whether this is the main process. Other ranks get no trackers.

    Returns:
        The started trackers.
    """
    if not is_main:
        return CompositeTracker([])
    metrics_jsonl = RunLayout(run_dir).metrics_jsonl
    trackers: list[Tracker] = [JsonlTracker(metrics_jsonl)]
    if "tensorboard" in track.backends:
        trackers.append(TensorBoardTracker(run_dir))
    if "wandb" in track.backends:
        trackers.append(WandbTracker(run_dir, track))
    composite = CompositeTracker(trackers)
    composite.start(config, step)
    # Read the file only now: `start` has removed its damaged lines.
    composite.already_logged = _read_logged_metrics(metrics_jsonl, step)
    return composite


def _read_logged_metrics(metrics_jsonl: Path, step: int) -> dict[int, set[str]]:
    """Return the names of the logged metrics, for the steps at which a resumed run may log again.

    At step 0 a run logs the quantization errors and its first evaluation. At `step` it repeats an
    evaluation that was interrupted. Rows of later steps are removed when the tracker starts.

    Args:
        metrics_jsonl: the metrics of earlier processes; the file may be missing.
        step: the optimizer step that the run resumes from; 0 for a fresh run.
    """
    try:
        rows = read_metrics(metrics_jsonl) if step else []
    except (OSError, ValueError):
        return {}
    # A row also has the keys `time` and `GLOBAL_STEP`, which are no metrics and do no harm here.
    return {row[GLOBAL_STEP]: set(row) for row in rows if row[GLOBAL_STEP] in (0, step)}
