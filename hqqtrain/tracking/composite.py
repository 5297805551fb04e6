"""One call to every tracker, and no tracker may stop a run.

A metrics server that is down or a disk that is full costs the curve, never the training: a
tracker that raises is named in one warning and left out from then on.
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
    """The trackers of one run, as one; itself a `Tracker` that never raises.

    `told`: step -> metrics that an earlier process of the run has told already. A run that goes
    on measures some of them once more; they are not told twice.
    """

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.live = list(trackers)
        self.told: Mapping[int, Container[str]] = {}

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        self._each(lambda tracker: tracker.start(config, step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        told = self.told.get(step, ())
        news = {name: value for name, value in metrics.items() if name not in told}
        if news:
            self._each(lambda tracker: tracker.log(news, step))

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.summary(summary))

    def images(self, paths: Mapping[str, Path]) -> None:
        self._each(lambda tracker: tracker.images(paths))

    def artifact(self, path: Path) -> None:
        self._each(lambda tracker: tracker.artifact(path))

    def hints(self) -> list[str]:
        """How a person gets to see what was tracked; ask before `finish`."""
        found: list[str | None] = []
        self._each(lambda tracker: found.append(tracker.hint()))
        return [hint for hint in found if hint]

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
                logger.warning(
                    "%s failed and is left out from now on: %s", name, mask_secrets(str(error))
                )


def open_trackers(
    config: TrackConfig,
    run_dir: Path,
    run_config: Mapping[str, Any],
    step: int = 0,
    *,
    main: bool = True,
) -> CompositeTracker:
    """Started trackers: metrics.jsonl always, and those of `track.backends`.

    `run_config` is the resolved configuration, logged without secrets; `step` the optimizer
    step that the run goes on from, 0 for one that begins. None at all where this is not the
    `main` process.
    """
    if not main:
        return CompositeTracker([])
    metrics = RunLayout(run_dir).metrics_jsonl
    chosen: list[Tracker] = [JsonlTracker(metrics)]
    if "tensorboard" in config.backends:
        chosen.append(TensorBoardTracker(run_dir))
    if "wandb" in config.backends:
        chosen.append(WandbTracker(run_dir, config))
    trackers = CompositeTracker(chosen)
    trackers.start(run_config, step)
    trackers.told = _told(metrics, step)
    return trackers


def _told(metrics: Path, step: int) -> dict[int, set[str]]:
    """What is told of the steps that a run which goes on from `step` may speak of once more."""
    try:
        rows = read_metrics(metrics) if step else []
    except (OSError, ValueError):
        return {}
    return {row[GLOBAL_STEP]: set(row) for row in rows if row[GLOBAL_STEP] in (0, step)}
