"""Names that keys had in earlier releases: they are refused with the new name, or read as it.

A command line or a recipe that uses an old name is refused, so that nobody keeps two spellings
alive. A config.yaml that an earlier release wrote is read through the same table.
"""

from collections.abc import Iterator, Mapping
from typing import Any

RENAMED_KEYS = {
    "train.checkpointing": "train.activation_checkpointing",
    "quant.storage": "quant.storage_dtype",
    "parallel.hybrid": "parallel.hsdp",
    "parallel.check_every": "parallel.consistency_check_every",
    "launch.jobs": "launch.max_parallel_jobs",
}
"""Old dotted key -> new dotted key, in the same group."""

RENAMED_VALUES = {("train.objective", "sft"): "next_token"}
"""(dotted key, old value) -> new value."""


def renamed_value_errors(group: str, config: Any) -> Iterator[str]:
    """Yield one sentence for every key of `group` that has an old value, with the new one."""
    for (dotted, old), new in RENAMED_VALUES.items():
        owner, _, name = dotted.partition(".")
        if owner == group and getattr(config, name) == old:
            yield f"{dotted}={old}: is called {new} now; use {dotted}={new}."


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config.yaml's `values`, group -> key -> value, with today's names."""
    renamed = {group: dict(v) if isinstance(v, dict) else v for group, v in values.items()}
    for old, new in RENAMED_KEYS.items():
        _move(renamed, old, new)
    for (dotted, old_value), new_value in RENAMED_VALUES.items():
        _replace(renamed, dotted, old_value, new_value)
    return renamed


def with_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `values` with the first release's names, over which identities are hashed.

    A run keeps its identity, and so its directory, when a key is renamed.
    """
    renamed = {group: dict(v) if isinstance(v, dict) else v for group, v in values.items()}
    for old, new in RENAMED_KEYS.items():
        _move(renamed, new, old)
    for (dotted, old_value), new_value in RENAMED_VALUES.items():
        _replace(renamed, dotted, new_value, old_value)
    return renamed


def _move(values: dict[str, Any], source: str, target: str) -> None:
    group, _, name = source.partition(".")
    if isinstance(values.get(group), dict) and name in values[group]:
        values[group][target.partition(".")[2]] = values[group].pop(name)


def _replace(values: dict[str, Any], dotted: str, old: Any, new: Any) -> None:
    group, _, name = dotted.partition(".")
    if isinstance(values.get(group), dict) and values[group].get(name) == old:
        values[group][name] = new
