"""What a tracker is: somewhere to send a run's metrics, and nothing a run depends on.

The methods may raise what they like; `Trackers` (fanout.py) sees to it that training does not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

LAYER_ERROR = "quant/relative_error/"
"""Prefix of the one metric that is logged per module."""

STEP = "train/global_step"


class Tracker(Protocol):
    """Receives one run. Called on the main process only."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Opens the run, or goes on with the one that the run directory holds."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics by the names of the contract, after optimizer step `step` (0: before any)."""

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The final figures: what summary.json holds."""

    def images(self, paths: Mapping[str, Path]) -> None:
        """The plots of the report, by name."""

    def finish(self, exit_code: int) -> None:
        """Closes the run; 0 means that it was done."""
