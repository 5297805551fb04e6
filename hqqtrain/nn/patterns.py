"""Patterns that select modules: the end of a name as in PEFT, a glob, or hqq's tag.

`q_proj` and `3.self_attn.q_proj` are ends of `model.layers.3.self_attn.q_proj`. A glob is matched
with the full name. hqq's tag is `self_attn.q_proj`: the name without "model", "layers" and numbers.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from hqqtrain.common.errors import UserError, did_you_mean


def hqq_tag(name: str) -> str:
    """Return hqq's tag of a module's full name."""
    omitted = ("model", "layers")
    return ".".join(part for part in name.split(".") if part not in omitted and not part.isdigit())


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether `pattern` selects module `name`."""
    return fnmatchcase(name, pattern) or name.endswith(f".{pattern}") or hqq_tag(name) == pattern


def matching_modules(
    key: str, patterns: Iterable[str], names: Iterable[str], kind: str = "linear layer"
) -> list[str]:
    """Return the `names` that any of `patterns` selects, in their order.

    Args:
        key: The config key that contains the patterns, for messages.
        patterns: Ends of names, globs or tags.
        names: Full names of modules.
        kind: What the modules are, for messages.

    Raises:
        UserError: Patterns select nothing. The message has a line for each.
    """
    names, patterns, errors = list(names), list(patterns), []
    for pattern in patterns:
        if not any(matches_pattern(pattern, name) for name in names):
            tags = dict.fromkeys(map(hqq_tag, names))
            ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
            errors.append(
                f"{key}={pattern}: matches no {kind}.{did_you_mean(pattern, ends | tags)} "
                f"Allowed are names, such as {', '.join(list(ends)[:12])}, globs over full names, "
                f"such as {names[0]}, and tags: {', '.join(list(tags)[:12])}."
            )
    if errors:
        raise UserError("\n".join(errors))
    return [name for name in names if any(matches_pattern(p, name) for p in patterns)]


def resolve_overrides(name: str, overrides: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Return whether module `name` is quantized, and the settings that `overrides` has for it.

    If several patterns match, their settings are merged, and later patterns take precedence. The
    value None excludes the module, unless a later pattern has settings for it.
    """
    merged: dict[str, Any] = {}
    is_quantized = True
    for pattern, settings in overrides.items():
        if matches_pattern(pattern, name):
            is_quantized = settings is not None
            merged |= settings or {}
    return is_quantized, merged
