"""The results of a benchmark: a CSV file with a row per measurement, the GPU and the date."""

import csv
import datetime
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch

import hqqtrain

T = TypeVar("T")

PACKAGES = ("torch", "triton", "hqq", "bitsandbytes", "gemlite")


@dataclass(frozen=True)
class Row:
    """One measurement. A provider that fails has a row without figures and a note that says why.

    Attributes:
        ms: Median time of a call.
        ratio: That time divided by the time of `baseline` in the same run.
        share: Share of the limit that memory bandwidth or the matrix units set, as measured in the
            same run.
    """

    part: str
    what: str
    shape: str
    provider: str
    nbits: int | None = None
    group_size: int | None = None
    axis: int | None = None
    ms: float | None = None
    baseline: str = ""
    ratio: float | None = None
    share: float | None = None
    note: str = ""


def run_columns(device: torch.device) -> dict[str, str]:
    """Return GPU, versions and date, the columns with equal values in all rows of a run."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)"
    others = (f"{name}={_version(name)}" for name in PACKAGES)
    versions = " ".join([f"hqqtrain={hqqtrain.__version__}", *others])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"gpu": gpu, "versions": versions, "date": today}


def write(file: Path, rows: Iterable[Row], shared: dict[str, str]) -> None:
    """Write the CSV file of one run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*shared, *(field.name for field in fields(Row))])
        writer.writeheader()
        for row in rows:
            writer.writerow(shared | {key: _short(value) for key, value in asdict(row).items()})


def line(row: Row) -> str:
    """Format a row for a terminal."""
    bits = "" if row.nbits is None else f"{row.nbits}-bit axis {row.axis}"
    measured = [
        "" if row.ms is None else f"{row.ms:9.4f} ms",
        "" if row.ratio is None else f"{row.ratio:8.4g} x {row.baseline}",
        "" if row.share is None else f"{row.share:6.1%} of the limit",
    ]
    texts = [f"{row.what:<34} {row.shape:<12} {bits:<13} {row.provider:<24}", *measured, row.note]
    return "  ".join(texts).rstrip()


def attempt(make: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result of `make`, or None and the error: a peer that fails is always reported."""
    try:
        return make(), ""
    except Exception as error:
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
