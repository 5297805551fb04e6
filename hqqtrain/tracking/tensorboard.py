"""The TensorBoard tracker, which writes event files to the run's directory.

Metrics are scalars. Quantization errors are a histogram and a table, not hundreds of curves. The
configuration and the summary are shown as text. They are also logged as hyperparameters and their
results, by which TensorBoard compares runs.
"""

import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.config.run import NON_RESULT_GROUPS
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import GLOBAL_STEP, LAYER_ERROR_PREFIX
from hqqtrain.tracking.base import flatten, layer_errors

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1
"""Seconds between two flushes; a killed process loses the events since the last one."""


class TensorBoardTracker:
    """Writes to `run_dir`/tensorboard. A resumed run hides the old events of repeated steps."""

    shows_images = True

    def __init__(self, run_dir: Path) -> None:
        self.folder = RunLayout(run_dir).tensorboard
        self._writer: Any = None
        self._config: dict[str, Any] = {}
        self._step = 0

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            logger.warning(
                "track.backends=[tensorboard]: tensorboard is not installed; the run continues "
                "without it. pip install tensorboard."
            )
            return
        from torch.utils.tensorboard import SummaryWriter

        self._config, self._step = mask_secrets(config), step
        purge_step = step + 1 if step else 0  # the first step that is logged again
        self._writer = SummaryWriter(
            str(self.folder), purge_step=purge_step, flush_secs=FLUSH_SECONDS
        )
        config_yaml = yaml.safe_dump(self._config, sort_keys=False)
        self._text("config", indent(config_yaml, 4 * " "))  # four spaces: Markdown's code block

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            return
        self._step = step
        for name, value in metrics.items():
            if LAYER_ERROR_PREFIX not in name and name != GLOBAL_STEP:
                self._writer.add_scalar(name, float(value), step)
        if errors := layer_errors(metrics):
            import numpy

            self._writer.add_histogram(
                "quant/relative_error", numpy.array(list(errors.values())), step
            )
            self._text(
                "quant/relative_errors", _table(("module", "relative error"), errors.items())
            )

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        values = flatten(summary)
        self._text("summary", _table(("figure", "value"), values.items()))
        numbers = {
            f"summary/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and name.split(".")[0] in _COMPARED_PARTS
        }
        for event in hparams(_settings(self._config), numbers):
            self._writer.file_writer.add_summary(event)
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, self._step)

    def log_images(self, paths: Mapping[str, Path]) -> None:
        if self._writer is None:
            return
        import numpy
        from PIL import Image

        for name, path in paths.items():
            with Image.open(path) as image:
                pixels = numpy.asarray(image.convert("RGB"))
            self._writer.add_image(f"report/{name}", pixels, self._step, dataformats="HWC")

    def log_artifact(self, path: Path) -> None:
        """Do nothing: the adapter stays in its folder."""

    def hint(self) -> str | None:
        return f"TensorBoard: tensorboard --logdir {self.folder}" if self._writer else None

    def finish(self, exit_code: int) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _text(self, tag: str, markdown: str) -> None:
        self._writer.add_text(tag, markdown, self._step)


_COMPARED_PARTS = ("quantize", "eval", "train")
"""Parts of the summary whose numbers are used to compare runs."""


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flattened settings that affect the result, as numbers and text.

    Booleans become text, because torch would log them as numbers.
    """
    settings = flatten(
        {group: keys for group, keys in config.items() if group not in NON_RESULT_GROUPS}
    )
    # `type`, not `isinstance`: a bool is an int, too.
    return {
        name: value if type(value) in (int, float, str) else str(value)
        for name, value in settings.items()
    }


def _table(headers: Sequence[str], rows: Iterable[tuple[str, Any]]) -> str:
    """Format a Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
