"""Terminal output: progress bars while a run works, and one results table at the end.

Bars are drawn only if standard error is a terminal. Otherwise, as in a log file, a plain line shows
the progress from time to time. Only the main process prints.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tabulate import tabulate
from tqdm import tqdm

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.common.text import escape_terminal

FIRST_LINE_SECONDS, LINE_SECONDS = 5.0, 60.0
"""Without a terminal: seconds until the first plain line, and between two lines."""

BAR_LINES = 20
"""Lines that a bar with numbers, such as losses, prints above itself from start to end."""

_YELLOW, _RED = 33, 31  # ANSI color codes


@dataclass(frozen=True)
class ResultRow:
    """A row of the results table; None is shown as a dash."""

    model: str
    perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    bits_per_weight: float | None = None
    gib: float | None = None
    seconds: float | None = None


class ProgressBar:
    """The progress of a task, as a bar or as plain lines. Use as a context manager.

    On a terminal, a bar overwrites itself. If it shows numbers, `BAR_LINES` plain lines stay above
    it, so that the losses of a training can be read on the screen afterwards.

    Args:
        description: the name of the work, such as `training`.
        total: the number of units; None if it is unknown.
        unit: the name of a unit, such as `step`.
        enabled: whether to print anything.
        initial: units done by an earlier process, which do not count for the rate.
    """

    def __init__(
        self, description: str, total: int | None, unit: str, enabled: bool, initial: int = 0
    ) -> None:
        self.description, self.total, self.unit, self.initial = description, total, unit, initial
        self._prints_lines = enabled and not sys.stderr.isatty()
        self._is_bar = enabled and not self._prints_lines
        self._bar = tqdm(
            total=total,
            desc=description,
            unit=unit,
            disable=not enabled or self._prints_lines,
            dynamic_ncols=True,
            file=sys.stderr,
            initial=initial,
            colour="green" if has_color() else None,
        )
        self._units_done, self._postfix = initial, ""
        self._start_time = time.monotonic()
        self._next_line_time = self._start_time + FIRST_LINE_SECONDS

    def update(self, n: int = 1, **postfix: float | str) -> None:
        """Advance by `n` units, and show `postfix`, such as loss=2.31, after the progress."""
        self._units_done += n
        if postfix:
            self._postfix = ", ".join(f"{name}={_short(value)}" for name, value in postfix.items())
            self._bar.set_postfix_str(self._postfix, refresh=False)
        self._bar.update(n)
        has_numbers = any(isinstance(value, int | float) for value in postfix.values())
        if self._is_bar and has_numbers and self._is_milestone(n):
            self._print_line()
        is_complete = self._units_done == self.total  # the line of `__exit__` follows
        if self._prints_lines and not is_complete and time.monotonic() >= self._next_line_time:
            self._print_line()
            self._next_line_time = time.monotonic() + LINE_SECONDS

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._prints_lines and self._units_done > self.initial:
            self._print_line(is_last=True)

    def _is_milestone(self, n: int) -> bool:
        """Whether the last `n` units have completed one of `BAR_LINES` equal parts of the total."""
        if not self.total:
            return False
        before, done = self._units_done - n, self._units_done
        return before * BAR_LINES // self.total < done * BAR_LINES // self.total

    def _print_line(self, is_last: bool = False) -> None:
        """Print `training: 12/100 steps (12%), 0.5 steps/s, ETA 02:56, loss=2.31`."""
        seconds = time.monotonic() - self._start_time
        rate = (self._units_done - self.initial) / seconds if seconds else 0.0
        total = f"/{self.total}" if self.total else ""
        percent = f" ({self._units_done / self.total:.0%})" if self.total else ""
        plural = "" if (self.total or self._units_done) == 1 else "s"
        parts = [f"{self.description}: {self._units_done}{total} {self.unit}{plural}{percent}"]
        parts += [f"{_short(rate)} {self.unit}s/s"] if rate else []
        if is_last:
            parts.append(f"in {tqdm.format_interval(seconds)}")
        elif self.total and rate:
            parts.append(f"ETA {tqdm.format_interval((self.total - self._units_done) / rate)}")
        parts += [self._postfix] if self._postfix else []
        self._bar.write(", ".join(parts), file=sys.stderr)
        sys.stderr.flush()


class Console:
    """The terminal output of a run: printed by the main process, silent on all other ranks."""

    def __init__(self, is_main: bool = True) -> None:
        self.is_main = is_main

    def progress_bar(
        self, description: str, total: int | None = None, unit: str = "it", initial: int = 0
    ) -> ProgressBar:
        """Return a progress bar.

        Args:
            description: the name of the work, such as `training`.
            total: the number of units; None if it is unknown.
            unit: the name of a unit, such as `step`.
            initial: units done by an earlier process, which do not count for the rate.
        """
        return ProgressBar(description, total, unit, self.is_main, initial)

    def print_results(
        self, rows: Sequence[ResultRow], files: Iterable[Path] = (), hints: Iterable[str] = ()
    ) -> None:
        """Print the results table, the written files, and hints to standard output."""
        if self.is_main:
            print("\n" + results_table(rows) + "\n" if rows else "")
            print("\n".join([*(f"wrote {file}" for file in files), *hints]), flush=True)

    def stream_text(self, text: str) -> None:
        """Write a piece of generated text to standard output at once.

        A terminal gets it without control characters, with which a model could steer it.
        """
        if self.is_main:
            sys.stdout.write(escape_terminal(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()

    def print_text(self, text: str) -> None:
        """Print text to standard output."""
        if self.is_main:
            print(text, flush=True)


def results_table(rows: Sequence[ResultRow]) -> str:
    """Format the results as plain text, one line per model. Columns without a value are omitted."""
    formats = {"model": "", "perplexity": ".3f", "KL": ".4f", "top-1": ".1%",
               "bits per weight": ".2f", "GiB": ".3f", "seconds": ".1f"}  # fmt: skip
    columns = dict(zip(formats, zip(*map(astuple, rows), strict=True), strict=True))
    shown = [name for name, cells in columns.items() if any(cell is not None for cell in cells)]
    return tabulate(
        list(zip(*(columns[name] for name in shown), strict=True)), shown,
        floatfmt=[formats[name] for name in shown], missingval="-",
    )  # fmt: skip


def setup_logging(is_main: bool = True) -> None:
    """Send log messages to standard error, above the progress bars.

    On the main process, hqqtrain logs at INFO and above, and other libraries at WARNING and above.
    The other ranks would repeat these messages, so they log errors only. This may be called again.
    """
    logger = logging.getLogger("hqqtrain")
    logger.handlers = [_BarHandler()]
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    for name in ("transformers", "datasets", "accelerate", "peft", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING if is_main else logging.ERROR)
    for category in (DeprecationWarning, FutureWarning):  # from libraries, meant for their authors
        warnings.simplefilter("ignore", category)
    if not is_main:
        warnings.simplefilter("ignore")


class _BarHandler(logging.Handler):
    """Prints a record with secrets masked and control characters escaped, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = escape_terminal(mask_secrets(self.format(record)))
            tqdm.write(_level_prefix(record.levelno) + message, file=sys.stderr)
        except Exception:
            self.handleError(record)


def _level_prefix(level: int) -> str:
    """Return `warning: ` and the like, colored on a terminal; empty for INFO and below."""
    if level <= logging.INFO:
        return ""
    prefix = f"{logging.getLevelName(level).lower()}: "
    color = _RED if level >= logging.ERROR else _YELLOW
    return f"\033[{color}m{prefix}\033[0m" if has_color() else prefix


def has_color(stream: TextIO | None = None) -> bool:
    """Whether `stream`, by default standard error, gets color.

    It does if it is a terminal with color. NO_COLOR (https://no-color.org) forbids color, and
    FORCE_COLOR (https://force-color.org) asks for it in any case; 0 counts as not set.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return os.environ.get("TERM") != "dumb" and (stream or sys.stderr).isatty()


def _short(value: Any) -> str:
    """Format a number with four significant digits, or as a whole number from 1,000 on."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
