"""How a config key is declared: default, help line and what is allowed, in one place.

The help lines become `--help`, the limits become the checks. Standard library only: the
command line composes and checks a configuration without importing torch.
"""

from collections.abc import Iterator
from dataclasses import MISSING, field, fields
from math import isfinite
from typing import Any


def key(default: Any = MISSING, help: str = "", *, choices: tuple = (), low: float | None = None,
        factory: Any = MISSING) -> Any:  # fmt: skip
    """A dataclass field that knows its help line and its allowed values.

    `choices` lists the values allowed (None among them where None is); `low` is the smallest
    number allowed. `factory` replaces `default` for lists and dicts.
    """
    metadata = {"help": help, "choices": choices, "low": low}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def field_errors(group: str, config: Any) -> Iterator[str]:
    """One sentence for every field of the dataclass `config` that holds what it must not."""
    for item in fields(config):
        value = getattr(config, item.name)
        choices, low = item.metadata.get("choices"), item.metadata.get("low")
        if choices and value not in choices:
            allowed = ", ".join("null" if c is None else str(c) for c in choices)
            yield f"{group}.{item.name}={_show(value)}: allowed are {allowed}."
        elif isinstance(value, float) and not isfinite(value):
            yield f"{group}.{item.name}={_show(value)}: must be finite."
        elif low is not None and value is not None and value < low:
            yield f"{group}.{item.name}={_show(value)}: must be at least {low}."


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
