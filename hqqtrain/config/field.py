"""Declare a config key in one place: its default, its help text and its allowed values.

`--help` prints the help texts, and `RunConfig.check` refuses values that are not allowed. This
module imports only the standard library, because the command line checks a configuration without
importing torch.
"""

from collections.abc import Iterator
from dataclasses import MISSING, field, fields
from math import isfinite
from types import NoneType
from typing import Any, get_args

DTYPES = ("auto", "fp32", "bf16", "fp16")
"""Allowed values of the keys that name a dtype."""

_MEAN_NULL = ("none", "false")
"""Words that mean null where it is allowed: nobody gives such a name to data or a folder."""


def key(default: Any = MISSING, help: str = "", *, choices: tuple = (), low: float | None = None,
        high: float | None = None, factory: Any = MISSING) -> Any:  # fmt: skip
    """Return a dataclass field that carries its help text and its allowed values.

    Args:
        default: The default value.
        help: The text that `--help` shows.
        choices: The allowed values, including None if null is allowed. Empty: any value.
        low: The smallest allowed number.
        high: The largest allowed number.
        factory: Makes the default of a list or dict, in place of `default`.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def field_errors(group: str, config: Any) -> Iterator[str]:
    """Yield one message for every field of the dataclass `config` whose value is not allowed."""
    for item in fields(config):
        value = getattr(config, item.name)
        choices, low = item.metadata.get("choices"), item.metadata.get("low")
        high = item.metadata.get("high")
        shown = f"{group}.{item.name}={_shown(value)}"
        if choices and value not in choices:
            allowed = ", ".join(map(_shown, choices))
            yield f"{shown}: allowed are {allowed}."
        elif isinstance(value, str) and not value.strip():
            null = "; use null for the default" if item.default is None else ""
            yield f"{shown}: must not be empty{null}."
        elif (
            isinstance(value, str)
            and value.lower() in _MEAN_NULL
            and NoneType in get_args(item.type)
        ):
            yield f"{shown}: use null for none."
        elif isinstance(value, str | list) and any("\0" in str(part) for part in value):
            yield f"{group}.{item.name}={value!r}: must not contain a NUL character."
        elif isinstance(value, float) and not isfinite(value):
            yield f"{shown}: must be finite."
        elif low is not None and value is not None and value < low:
            yield f"{shown}: must be at least {low}."
        elif high is not None and value is not None and value > high:
            yield f"{shown}: must be at most {high:,}."


def _shown(value: Any) -> str:
    """Return a value as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def is_names(value: Any) -> bool:
    """Whether `value` is a list of strings that are not blank."""
    return isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)
