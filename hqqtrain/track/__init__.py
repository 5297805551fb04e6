"""Experiment tracking: metrics.jsonl, W&B, TensorBoard, the terminal, and the report."""

from hqqtrain.track.base import LAYER_ERROR, Tracker
from hqqtrain.track.console import Console, Progress, ResultRow, results_table, setup_logging
from hqqtrain.track.document import document, images, table
from hqqtrain.track.fanout import Trackers, open_trackers
from hqqtrain.track.figures import COLORS, MUTED, new_figure, save_figure
from hqqtrain.track.jsonl import JsonlTracker, read_metrics
from hqqtrain.track.report import write_report
from hqqtrain.track.run_id import forget_run_id, keep_run_id, run_id
from hqqtrain.track.tensorboard import TensorBoardTracker
from hqqtrain.track.wandb import WandbTracker

__all__ = [
    "COLORS", "LAYER_ERROR", "MUTED", "Console", "JsonlTracker", "Progress", "ResultRow",
    "TensorBoardTracker", "Tracker", "Trackers", "WandbTracker", "document", "forget_run_id",
    "images", "keep_run_id", "new_figure", "open_trackers", "read_metrics", "results_table",
    "run_id", "save_figure", "setup_logging", "table", "write_report",
]  # fmt: skip
