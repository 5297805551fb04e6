"""Several sources in `data.source`: a list of paths, or of paths with settings of their own."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from hqqtrain.common.errors import did_you_mean
from hqqtrain.config.foreign_names import reason_to_leave_out


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of the sources of `data.source`.

    Attributes:
        path: A file, folder, pattern or hub name.
        repeats: How often each example is used in an epoch; with a fraction, some are used once
            more than the others.
        weight: Share of the examples of an epoch, relative to the weights of the other sources.
        format: `data.format` for this source; None: that of all.
        file_type: `data.file_type` for this source; None: that of all.
        text_field: `data.text_field` for this source; None: that of all.
    """

    path: str
    repeats: float = 1.0
    weight: float | None = None
    format: str | None = None
    file_type: str | None = None
    text_field: str | None = None


KEYS = tuple(field.name for field in fields(DataSource))

FORMATS = ("auto", "text", "chat", "alpaca", "completion", "tokens")
FILE_TYPES = ("auto", "text", "jsonl", "csv", "parquet", "arrow")
"""The values of `data.format` and of `data.file_type`."""

_CHOICES = {"format": FORMATS, "file_type": FILE_TYPES}


def listed_sources(source: Any) -> list[DataSource]:
    """Return the sources of a value of `data.source` that has no errors."""
    items = source if isinstance(source, list) else [source]
    given = [dict(item) if isinstance(item, dict) else {"path": item} for item in items]
    settings: list[dict[str, Any]] = [  # null means the default
        {key: value for key, value in item.items() if value is not None} for item in given
    ]
    # A path such as 2024 was read as a number.
    return [DataSource(**{**item, "path": str(item["path"])}) for item in settings]


def source_paths(source: Any) -> list[str]:
    """Return the paths and names in a value of `data.source` that has no errors."""
    return [item.path for item in listed_sources(source)]


def describe_source(source: Any) -> str:
    """Return a value of `data.source` for messages: the sources, joined by ` + `."""
    return " + ".join(source_paths(source))


def source_errors(source: Any) -> Iterator[str]:
    """Yield one message for every fault of a value of `data.source`."""
    if isinstance(source, str | int | float):
        return  # checked as every value is
    example = "such as [a.jsonl, {path: b.jsonl, repeats: 2}]"
    if not isinstance(source, list) or not source:
        shown = "null" if source is None else source
        yield f"data.source={shown}: must be a path or name, or a list of them, {example}."
        return
    weights = [isinstance(item, dict) and item.get("weight") is not None for item in source]
    for index, item in enumerate(source):
        key = f"data.source[{index}]"
        path = item.get("path") if isinstance(item, dict) else item
        if not isinstance(path, str | int | float) or not str(path).strip() or "\0" in str(path):
            yield f"{key}={item}: must be a path or name, or have a path, {example}."
        elif isinstance(item, dict):
            yield from _setting_errors(key, item)
            if any(weights) and not weights[index]:
                yield f"{key}={path}: has no weight; give weights to all sources, or to none."
        elif any(weights):
            yield f"{key}={path}: has no weight; give weights to all sources, or to none."
    if any(isinstance(item, dict) and item.keys() - {*KEYS} for item in source):
        yield f"Keys of a source: {', '.join(KEYS)}."


def _setting_errors(key: str, item: dict[str, Any]) -> Iterator[str]:
    """Yield one message for every fault in the settings of one source."""
    for name, value in item.items():
        if name not in KEYS:
            reason = reason_to_leave_out(str(name))
            hint = f" Leave it out: {reason}." if reason else did_you_mean(str(name), KEYS)
            yield f"{key}.{name}: unknown key.{hint}"
        elif name in ("repeats", "weight") and value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not isfinite(value) or value <= 0:
                yield f"{key}.{name}={value}: must be a number above 0."
        elif name in _CHOICES and value is not None and value not in _CHOICES[name]:
            yield f"{key}.{name}={value}: allowed are {', '.join(_CHOICES[name])}."
        elif name == "text_field" and value is not None and not isinstance(value, str):
            yield f"{key}.{name}={value}: must be the name of a column."
    if item.get("weight") is not None and item.get("repeats") is not None:
        yield f"{key}: has a weight and also repeats; use one of them."
