"""One call to every tracker, and no tracker may stop a run.

A metrics server that is down or a disk that is full costs the curve, never the training: a
tracker that raises is named in one warning and left out from then on.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hqqtrain.config import TrackConfig
from hqqtrain.track.base import Tracker
from hqqtrain.track.jsonl import JsonlTracker
from hqqtrain.track.wandb import WandbTracker

logger = logging.getLogger(__name__)


class Trackers:
    """The trackers of one run, as one; itself a `Tracker` that never raises."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.live = list(trackers)

    def start(self, config: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.start(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, step))

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.summary(summary))

    def images(self, paths: Mapping[str, Path]) -> None:
        self._each(lambda tracker: tracker.images(paths))

    def finish(self, exit_code: int = 0) -> None:
        self._each(lambda tracker: tracker.finish(exit_code))
        self.live = []

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.live):
            try:
                call(tracker)
            except Exception as error:
                self.live.remove(tracker)
                name = type(tracker).__name__
                logger.warning("%s failed and is left out from now on: %s", name, error)


def open_trackers(
    config: TrackConfig, run_dir: Path, run_config: Mapping[str, Any], *, main: bool = True
) -> Trackers:
    """Started trackers: metrics.jsonl always, and those of `track.backends`.

    `run_config` is the resolved configuration, logged without secrets. None at all where this is
    not the `main` process.
    """
    chosen: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl")] if main else []
    if main and "wandb" in config.backends:
        chosen.append(WandbTracker(run_dir, project=config.project, entity=config.entity))
    trackers = Trackers(chosen)
    trackers.start(run_config)
    return trackers
