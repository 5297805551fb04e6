"""What a person at the terminal sees: bars while it works, one table at the end.

Bars only where standard error is a terminal; in a log file a plain line now and then says the
same. Only the main process speaks.
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
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from hqqtrain.common.secrets import mask_secrets

FIRST_SECONDS, LINE_SECONDS = 5.0, 60.0
"""Where there is no terminal: when the first plain line may come, and how often one is written."""

_YELLOW, _RED = 33, 31


@dataclass(frozen=True)
class ResultRow:
    """A line of the final table; None is shown as a dash."""

    model: str
    perplexity: float | None = None
    kl: float | None = None
    bits_per_weight: float | None = None
    gib: float | None = None
    seconds: float | None = None


class ProgressBar:
    """How far a piece of work is, from `initial` on. Use as a context manager."""

    def __init__(
        self, description: str, total: int | None, unit: str, enabled: bool, initial: int = 0
    ) -> None:
        self.description, self.total, self.unit, self.initial = description, total, unit, initial
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total, desc=description, unit=unit, disable=not enabled or self._lines,
            dynamic_ncols=True, file=sys.stderr, initial=initial,
            colour="green" if _has_colour() else None,
        )  # fmt: skip
        self._done, self._postfix = initial, ""
        self._started = time.monotonic()
        self._next_line = self._started + FIRST_SECONDS

    def update(self, n: int = 1, **postfix: float | str) -> None:
        """`n` more units are done; `postfix` says how it goes, such as loss=2.31."""
        self._done += n
        if postfix:
            self._postfix = ", ".join(f"{k}={_short(v)}" for k, v in postfix.items())
            self._bar.set_postfix_str(self._postfix, refresh=False)
        self._bar.update(n)
        if self._lines and time.monotonic() >= self._next_line:
            self._line()
            self._next_line = time.monotonic() + LINE_SECONDS

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._bar.close()
        if self._lines and self._done > self.initial:
            self._line(last=True)

    def _line(self, last: bool = False) -> None:
        """`training: 12/100 steps (12%), 0.5 steps/s, ETA 02:56, loss=2.31`"""
        seconds = time.monotonic() - self._started
        rate = (self._done - self.initial) / seconds if seconds else 0.0
        of = f"/{self.total}" if self.total else ""
        share = f" ({self._done / self.total:.0%})" if self.total else ""
        parts = [f"{self.description}: {self._done}{of} {self.unit}s{share}"]
        parts += [f"{_short(rate)} {self.unit}s/s"] if rate else []
        if last:
            parts.append(f"in {tqdm.format_interval(seconds)}")
        elif self.total and rate:
            parts.append(f"ETA {tqdm.format_interval((self.total - self._done) / rate)}")
        print(", ".join([*parts, self._postfix] if self._postfix else parts),
              file=sys.stderr, flush=True)  # fmt: skip


class Console:
    """The terminal of the main process; silent on the others."""

    def __init__(self, main: bool = True) -> None:
        self.main = main

    def progress(
        self, description: str, total: int | None = None, unit: str = "it", initial: int = 0
    ) -> ProgressBar:
        """`initial` of `total` were done by an earlier process: no time of this one."""
        return ProgressBar(description, total, unit, self.main, initial)

    def results(
        self, rows: Sequence[ResultRow], files: Iterable[Path] = (), hints: Iterable[str] = ()
    ) -> None:
        """The final table, the files that were written and how to see more, on standard output."""
        if self.main:
            print("\n" + results_table(rows) + "\n")
            print("\n".join([*(f"wrote {file}" for file in files), *hints]), flush=True)


def results_table(rows: Sequence[ResultRow]) -> str:
    """Plain text, one line per model."""
    headers = ("model", "perplexity", "KL", "bits per weight", "GiB", "seconds")
    formats = ("", ".3f", ".4f", ".2f", ".3f", ".1f")
    return tabulate([astuple(row) for row in rows], headers, floatfmt=formats, missingval="-")


def setup_logging(main: bool = True) -> None:
    """Messages of hqqtrain from INFO up on standard error, above the bars; faults elsewhere.

    Ranks other than the main one repeat what it says, so only their errors are shown. Safe to
    call twice.
    """
    logger = logging.getLogger("hqqtrain")
    logger.handlers = [_BarHandler()]
    logger.setLevel(logging.INFO if main else logging.ERROR)
    for name in ("transformers", "datasets", "accelerate", "peft", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING if main else logging.ERROR)
    for category in (DeprecationWarning, FutureWarning):  # of libraries, to their authors
        warnings.simplefilter("ignore", category)
    if not main:
        warnings.simplefilter("ignore")


class _BarHandler(logging.Handler):
    """Writes a record, without secrets, and without tearing a bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(_level(record.levelno) + mask_secrets(self.format(record)), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _level(level: int) -> str:
    if level <= logging.INFO:
        return ""
    word = f"{logging.getLevelName(level).lower()}: "
    colour = _RED if level >= logging.ERROR else _YELLOW
    return f"\033[{colour}m{word}\033[0m" if _has_colour() else word


def _has_colour() -> bool:
    """On a terminal that can, unless the user will not have it (https://no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and sys.stderr.isatty()


def _short(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
