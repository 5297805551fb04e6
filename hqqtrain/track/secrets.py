"""A configuration that leaves the machine carries no secrets with it."""

import re
from collections.abc import Mapping
from typing import Any

_KEY = re.compile(r"token$|secret|password|api_?key|credential", re.IGNORECASE)
_VALUE = re.compile(r"\b(hf_|sk-|ghp_|wandb_v1_)\w{8,}|(?<=://)[^/\s@]+@")
MASK = "***"


def masked(value: Any) -> Any:
    """`value` with what looks like a secret replaced, by the name of its key or by its form."""
    if isinstance(value, Mapping):
        return {k: MASK if _secret(k, v) else masked(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return _VALUE.sub(MASK, value) if isinstance(value, str) else value


def _secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(_KEY.search(str(key)))
