"""Keeps passwords out of files that are shared: run directories get copied and uploaded."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_NAMES = re.compile(r"(token|password|passwd|secret|credential|api[-_]?key)$", re.IGNORECASE)
_VALUES = re.compile(
    r"\b(?:hf_|sk-|ghp_|wandb_v1_)\w{8,}"
    r"|(?<![0-9A-Za-z])(?<!snapshots/)[0-9a-f]{40}(?![0-9A-Za-z])"  # W&B's older keys
    r"|(?<=://)[^/\s@]+(?=@)"  # user:password@host, token@host
)
# A commit has the form of an old W&B key, and is what makes a run reproducible.
_COMMITS = re.compile(r"(^|[._-])(revision|commit|identity)$", re.IGNORECASE)


def masked(value: Any, name: str = "") -> Any:
    """A copy of `value` (JSON's types) without secrets; `name` is the key it stands under."""
    if isinstance(value, Mapping):
        return {k: masked(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [masked(v, name) for v in value]
    if not isinstance(value, str) or _COMMITS.search(name):
        return value
    return MASK if _NAMES.search(name) and value else _VALUES.sub(MASK, value)


def masked_command(words: list[str]) -> list[str]:
    """A command line without secrets: `x.token=...`, `--api-key ...`, and known forms."""
    shown, previous = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            shown.append(f"{name}={masked(value, name)}")
        else:
            shown.append(masked(word, previous if previous.startswith("-") else ""))
        previous = word
    return shown
