"""What a tracker is: somewhere to send a run's metrics, and nothing a run depends on.

The methods may raise what they like; `CompositeTracker` (fanout.py) sees to it that training does not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hqqtrain.rundir.schema import LAYER_ERROR


class Tracker(Protocol):
    """Receives one run. Called on the main process only."""

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        """Opens the run, or goes on with the one that the run directory holds.

        `step` is the optimizer step that the run goes on from, 0 for one that begins: what an
        earlier process has told of later steps will be told again.
        """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics by the names of the contract, after optimizer step `step` (0: before any)."""

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The final figures: what summary.json holds."""

    def images(self, paths: Mapping[str, Path]) -> None:
        """The plots of the report, by name."""

    def artifact(self, path: Path) -> None:
        """The folder of the trained adapter."""

    def hint(self) -> str | None:
        """How a person gets to see what was tracked; None where the file speaks for itself."""

    def finish(self, exit_code: int) -> None:
        """Closes the run; 0 means that it was done."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"eval": {"tokens": 1}} -> {"eval.tokens": 1}: dots, so that no metric is overwritten."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        found |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def layer_errors(metrics: Mapping[str, float]) -> dict[str, float]:
    """Module -> relative error, of the metrics that are logged per module."""
    return {n.removeprefix(LAYER_ERROR): v for n, v in metrics.items() if LAYER_ERROR in n}
