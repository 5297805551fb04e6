"""The interface of a tracker, a destination for metrics that a run must not depend on.

The methods may raise any exception; `CompositeTracker` catches it, so that training continues.
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
            step: the optimizer step that the run resumes from; 0 for a fresh run. Metrics of later
                steps that an earlier process has logged will be logged again.
        """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics by name, e.g. `train/loss`, after optimizer step `step` (0: before any)."""

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Log the final figures, which are the content of summary.json."""

    def log_images(self, paths: Mapping[str, Path]) -> None:
        """Log the plots of the report, given as name -> PNG file."""

    def log_artifact(self, path: Path) -> None:
        """Upload the trained adapter in folder `path`."""

    def hint(self) -> str | None:
        """Return how a user can view the run; None if no explanation is needed."""

    def finish(self, exit_code: int) -> None:
        """Close the run. Exit code 0 means that the run is done."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {"eval": {"tokens": 1}} -> {"eval.tokens": 1}.

    Names are joined by dots. Metrics are joined by slashes, so no metric is overwritten.
    """
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flattened |= flatten(value, f"{prefix}{name}.")
        else:
            flattened[f"{prefix}{name}"] = value
    return flattened


def layer_errors(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return module name -> relative error, from the metrics that are logged per module."""
    return {
        n.removeprefix(LAYER_ERROR_PREFIX): v for n, v in metrics.items() if LAYER_ERROR_PREFIX in n
    }
