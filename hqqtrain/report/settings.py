"""The settings of a run on its page: hyper-parameters first, and the rest on a click."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from hqqtrain.report.html import render_details, render_section, render_tables
from hqqtrain.tracking.base import flatten

_HYPERPARAMETERS = ("model", "quant", "adapter", "train", "optim", "data", "eval", "parallel")
"""Groups of the configuration that define the result or its cost."""


def render_settings(config: Mapping[str, Any]) -> str:
    """Return sections with the content of config.yaml; empty if it is unknown."""
    groups = {name: group for name, group in config.items() if isinstance(group, Mapping)}
    if not groups:
        return ""
    shown = {name: _rows(groups[name]) for name in _HYPERPARAMETERS if name in groups}
    others = {name: _rows(group) for name, group in groups.items() if name not in shown}
    command = config.get("command")
    if isinstance(command, list):
        others["command"] = [(shlex.join(map(str, command)), "")]
    revision = config.get("git_revision")
    others["source"] = [("git revision", str(revision))] if revision else []
    others = {name: rows for name, rows in others.items() if rows}
    return render_section("Hyper-parameters", render_tables(shown)) + render_details(
        "Other settings and versions", render_tables(others)
    )


def _rows(group: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (key, value) of all keys of a group that are set."""
    values = {key: value for key, value in flatten(group).items() if value not in (None, [], {})}
    return [(key, _format(value)) for key, value in values.items()]


def _format(value: Any) -> str:
    """Return a value as the command line takes it, as far as people care."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(_format, value))
    return value if isinstance(value, str) else json.dumps(value)
