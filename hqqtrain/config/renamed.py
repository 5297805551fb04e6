"""Names that keys and values had in earlier releases.

A command line or a recipe that uses an old name is refused, and the message has the new name, so
that no key keeps two spellings. A config.yaml of an earlier release is read with the new names.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hqqtrain.config.activation_checkpointing import KEY as CHECKPOINTING
from hqqtrain.config.activation_checkpointing import named_mode

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

OFFLOADED_INPUTS = {"activations": "none", "all": "parameters"}
"""Old value of parallel.offload -> its value beside train.activation_checkpointing=offload."""

MOVED_VALUES = {
    ("data.format", "jsonl"): ("data.file_type", "auto"),
    ("data.format", "parquet"): ("data.file_type", "auto"),
}
"""(dotted key, old value) -> the key of the same group that has this value now, and its default."""


def renamed_value_errors(group: str, config: Any) -> Iterator[str]:
    """Yield one message for every key of `group` that has an old value, with the new one.

    Args:
        group: Name of the group.
        config: The dataclass of the group.
    """
    for (dotted, old), new in RENAMED_VALUES.items():
        key_group, _, name = dotted.partition(".")
        if key_group == group and getattr(config, name) == old:
            yield f"{dotted}={old}: is called {new} now; use {dotted}={new}."
    for (dotted, old), (new_key, _) in MOVED_VALUES.items():
        key_group, _, name = dotted.partition(".")
        if key_group == group and getattr(config, name) == old:
            yield f"{dotted}={old}: is a value of {new_key} now; use {new_key}={old}."
    if group == "parallel" and config.offload in OFFLOADED_INPUTS:
        parameters = OFFLOADED_INPUTS[config.offload]
        rest = f" with parallel.offload={parameters}" if parameters != "none" else ""
        yield (
            f"parallel.offload={config.offload}: offloading of activations is a value of "
            f"{CHECKPOINTING} now; use {CHECKPOINTING}=offload{rest}."
        )


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the `values` of a config.yaml (group -> key -> value) with today's names."""
    renamed = {group: dict(v) if isinstance(v, dict) else v for group, v in values.items()}
    for old, new in RENAMED_KEYS.items():
        _move(renamed, old, new)
    for (dotted, old_value), new_value in RENAMED_VALUES.items():
        _replace(renamed, dotted, old_value, new_value)
    for (dotted, value), (new_key, default) in MOVED_VALUES.items():
        _move_value(renamed, dotted, new_key, value, default)
    _convert(renamed, CHECKPOINTING, named_mode)  # it was true or false in earlier releases
    if renamed.get("parallel", {}).get("offload") in OFFLOADED_INPUTS:
        _convert(renamed, "parallel.offload", OFFLOADED_INPUTS.get)
        _convert(renamed, CHECKPOINTING, lambda _: "offload")
    return renamed


def with_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `values` with the first release's names, over which identities are hashed.

    A run keeps its identity, and so its directory, when a key is renamed.
    """
    renamed = {group: dict(v) if isinstance(v, dict) else v for group, v in values.items()}
    # The number of recomputed layers does not change the result.
    _convert(renamed, CHECKPOINTING, lambda mode: named_mode(mode) != "none")
    for old, new in RENAMED_KEYS.items():
        _move(renamed, new, old)
    for (dotted, old_value), new_value in RENAMED_VALUES.items():
        _replace(renamed, dotted, new_value, old_value)
    for (dotted, value), (new_key, default) in MOVED_VALUES.items():
        _move_value(renamed, new_key, dotted, value, default)
    return renamed


def _move(values: dict[str, Any], source: str, target: str) -> None:
    """Rename the dotted key `source` to `target`, in place. Both are in the same group."""
    group, _, name = source.partition(".")
    if isinstance(values.get(group), dict) and name in values[group]:
        new_name = target.partition(".")[2]
        values[group][new_name] = values[group].pop(name)


def _replace(values: dict[str, Any], dotted: str, old: Any, new: Any) -> None:
    """Replace the value `old` of the dotted key by `new`, in place."""
    group, _, name = dotted.partition(".")
    if isinstance(values.get(group), dict) and values[group].get(name) == old:
        values[group][name] = new


def _convert(values: dict[str, Any], dotted: str, convert: Callable[[Any], Any]) -> None:
    """Replace the value of the dotted key, if it has one, by what `convert` returns, in place."""
    group, _, name = dotted.partition(".")
    if isinstance(values.get(group), dict) and name in values[group]:
        values[group][name] = convert(values[group][name])


def _move_value(values: dict[str, Any], source: str, target: str, value: Any, default: Any) -> None:
    """Move `value` of the dotted key `source` to `target`, if that has its default, in place.

    Both keys are in the same group and have the same default.
    """
    group, _, name = source.partition(".")
    target_name = target.partition(".")[2]
    settings = values.get(group)
    if not isinstance(settings, dict) or settings.get(name) != value:
        return
    if settings.get(target_name, default) == default:
        settings |= {name: default, target_name: value}
