"""Sends every call to all trackers, and keeps their failures away from the run.

A metrics server that is down or a full disk must never stop the training. A tracker that raises is
reported in one warning and disabled for the rest of the run.
"""

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from hqqtrain.config import TrackConfig
from hqqtrain.config.secrets import masked
from hqqtrain.track.base import STEP, Tracker
from hqqtrain.track.jsonl import JsonlTracker, read_metrics
from hqqtrain.track.tensorboard import TensorBoardTracker
from hqqtrain.track.wandb import WandbTracker

logger = logging.getLogger(__name__)


class Trackers:
    """A composite of a run's trackers that itself never raises.

    Attributes:
        live: the trackers that have not failed.
        told: step -> names of the metrics that an earlier process of the run has logged. A resumed
            run measures some of them again; they are not logged twice.
    """

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.live = list(trackers)
        self.told: Mapping[int, Container[str]] = {}

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        self._call_each(lambda tracker: tracker.start(config, step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        already_logged = self.told.get(step, ())
        new = {name: value for name, value in metrics.items() if name not in already_logged}
        if new:
            self._call_each(lambda tracker: tracker.log(new, step))

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._call_each(lambda tracker: tracker.summary(summary))

    def images(self, paths: Mapping[str, Path]) -> None:
        self._call_each(lambda tracker: tracker.images(paths))

    def artifact(self, path: Path) -> None:
        self._call_each(lambda tracker: tracker.artifact(path))

    def hints(self) -> list[str]:
        """Return how a user can view the run. Must be called before `finish`."""
        hints: list[str | None] = []
        self._call_each(lambda tracker: hints.append(tracker.hint()))
        return [hint for hint in hints if hint]

    def finish(self, exit_code: int = 0) -> None:
        self._call_each(lambda tracker: tracker.finish(exit_code))
        self.live = []

    def _call_each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.live):
            try:
                call(tracker)
            except Exception as error:
                self.live.remove(tracker)
                name = type(tracker).__name__
                logger.warning("%s failed and is disabled: %s", name, masked(str(error)))


def open_trackers(
    config: TrackConfig,
    run_dir: Path,
    run_config: Mapping[str, Any],
    step: int = 0,
    *,
    main: bool = True,
) -> Trackers:
    """Start the trackers of a run: metrics.jsonl always, and those of `track.backends`.

    Args:
        config: the tracking configuration.
        run_dir: the run directory.
        run_config: the resolved configuration, which is logged with secrets masked.
        step: the optimizer step that the run resumes from; 0 for a fresh run.
        main: whether this is the main process. Other ranks get no trackers.

    Returns:
        The started trackers.
    """
    if not main:
        return Trackers([])
    metrics = run_dir / "metrics.jsonl"
    chosen: list[Tracker] = [JsonlTracker(metrics)]
    if "tensorboard" in config.backends:
        chosen.append(TensorBoardTracker(run_dir))
    if "wandb" in config.backends:
        chosen.append(WandbTracker(run_dir, config))
    trackers = Trackers(chosen)
    trackers.start(run_config, step)
    trackers.told = _logged_metrics(metrics, step)
    return trackers


def _logged_metrics(metrics: Path, step: int) -> dict[int, set[str]]:
    """Return the logged metrics of the steps that a run resumed from `step` measures again.

    These are step 0 and `step` itself.
    """
    try:
        rows = read_metrics(metrics) if step else []
    except (OSError, ValueError):
        return {}
    return {row[STEP]: set(row) for row in rows if row[STEP] in (0, step)}
