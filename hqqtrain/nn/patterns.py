"""Patterns that select modules: a glob over the full name, or hqq's tag.

hqq's tag of `model.layers.3.self_attn.q_proj` is `self_attn.q_proj`: the name without "model",
"layers" and numbers.
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
    return fnmatchcase(name, pattern) or hqq_tag(name) == pattern


def matching_modules(key: str, patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the `names` that any of `patterns` selects, in their order.

    Args:
        key: The config key that contains the patterns, for messages.
        patterns: Globs or tags.
        names: Full names of modules.

    Raises:
        UserError: A pattern selects nothing.
    """
    names = list(names)
    for pattern in patterns:
        if not any(matches_pattern(pattern, name) for name in names):
            tags = dict.fromkeys(map(hqq_tag, names))
            raise UserError(
                f"{key}={pattern}: matches no linear layer.{did_you_mean(pattern, tags)} "
                f"Allowed are globs over full names, such as {names[0]}, and tags: "
                f"{', '.join(list(tags)[:12])}."
            )
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
