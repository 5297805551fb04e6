"""The interface of a tracker, which is a destination for the metrics of a run.

A run must not depend on its trackers. So their methods may raise any exception: `CompositeTracker`
catches it, and training continues.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hqqtrain.rundir.schema import LAYER_ERROR_PREFIX


class Tracker(Protocol):
    """Records one run. Its methods are called on the main process only."""

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        """Start the run, or resume the one in the run directory.

        Args:
            config: the resolved configuration.
            step: the optimizer step that the run resumes from; 0 for a fresh run. The run repeats
                the later steps of an earlier process, so it logs their metrics again.
        """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics by name, e.g. `train/loss`, after `step` optimizer steps."""

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Log the content of summary.json."""

    shows_images: bool
    """Whether `log_images` does anything; if no tracker does, no image is drawn."""

    def log_images(self, paths: Mapping[str, Path]) -> None:
        """Log the plots of the report, given as name -> PNG file."""

    def log_artifact(self, path: Path) -> None:
        """Upload the trained adapter in folder `path`."""

    def hint(self) -> str | None:
        """Return a line that tells the user how to view the run; None for no line."""

    def finish(self, exit_code: int) -> None:
        """Close the run. Exit code 0 means that the run is done."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {"eval": {"tokens": 1}} -> {"eval.tokens": 1}.

    Names are joined by dots. Names of metrics contain slashes instead, so the two never collide.
    """
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flattened |= flatten(value, f"{prefix}{name}.")
        else:
            flattened[f"{prefix}{name}"] = value
    return flattened


def layer_errors(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return module name -> relative error, for the metrics that have `LAYER_ERROR_PREFIX`."""
    return {
        name.removeprefix(LAYER_ERROR_PREFIX): value
        for name, value in metrics.items()
        if LAYER_ERROR_PREFIX in name
    }
