"""Sends every call to all trackers, and keeps their failures away from the run.

A metrics server that is down or a full disk must never stop the training. A tracker that raises is
reported in one warning and disabled for the rest of the run.
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
    """A composite of a run's trackers that itself never raises.

    Attributes:
        active: the trackers that have not failed.
        already_logged: step -> names of the metrics that an earlier process of the run has logged.
            A resumed run measures some of them again; they are not logged twice.
    """

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.active = list(trackers)
        self.already_logged: Mapping[int, Container[str]] = {}

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        self._call_each(lambda tracker: tracker.start(config, step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        already_logged = self.already_logged.get(step, ())
        new = {name: value for name, value in metrics.items() if name not in already_logged}
        if new:
            self._call_each(lambda tracker: tracker.log(new, step))

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        self._call_each(lambda tracker: tracker.log_summary(summary))

    def log_images(self, paths: Mapping[str, Path]) -> None:
        self._call_each(lambda tracker: tracker.log_images(paths))

    def log_artifact(self, path: Path) -> None:
        self._call_each(lambda tracker: tracker.log_artifact(path))

    def hints(self) -> list[str]:
        """Return how a user can view the run. Must be called before `finish`."""
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
                name = type(tracker).__name__
                logger.warning("%s failed and is disabled: %s", name, mask_secrets(str(error)))


def open_trackers(
    config: TrackConfig,
    run_dir: Path,
    run_config: Mapping[str, Any],
    step: int = 0,
    *,
    is_main: bool = True,
) -> CompositeTracker:
    """Start the trackers of a run: metrics.jsonl always, and those of `track.backends`.

    Args:
        config: the tracking configuration.
        run_dir: the run directory.
        run_config: the resolved configuration, which is logged with secrets masked.
        step: the optimizer step that the run resumes from; 0 for a fresh run.
        is_main: whether this is the main process. Other ranks get no trackers.

    Returns:
        The started trackers.
    """
    if not is_main:
        return CompositeTracker([])
    metrics = RunLayout(run_dir).metrics_jsonl
    chosen: list[Tracker] = [JsonlTracker(metrics)]
    if "tensorboard" in config.backends:
        chosen.append(TensorBoardTracker(run_dir))
    if "wandb" in config.backends:
        chosen.append(WandbTracker(run_dir, config))
    trackers = CompositeTracker(chosen)
    trackers.start(run_config, step)
    trackers.already_logged = _logged_metrics(metrics, step)
    return trackers


def _logged_metrics(metrics: Path, step: int) -> dict[int, set[str]]:
    """Return the logged metrics of the steps that a run resumed from `step` measures again.

    These are step 0 and `step` itself.
    """
    try:
        rows = read_metrics(metrics) if step else []
    except (OSError, ValueError):
        return {}
    return {row[GLOBAL_STEP]: set(row) for row in rows if row[GLOBAL_STEP] in (0, step)}
