"""The values of `train.activation_checkpointing`, and what they stand for."""

from collections.abc import Iterator
from typing import Any

KEY = "train.activation_checkpointing"
MODES = ("auto", "none", "full", "offload")
"""The values that are words; a number of decoder layers is allowed, too."""


def named_mode(value: Any) -> Any:
    """Return the word for true and false, which other programs and earlier releases have."""
    return ("full" if value else "none") if isinstance(value, bool) else value


def mode_errors(value: Any) -> Iterator[str]:
    """Yield a message if `train.activation_checkpointing` does not allow `value`."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not is_number and value not in MODES:
        shown = "null" if value is None else value
        yield f"{KEY}={shown}: allowed are {', '.join(MODES)}, or a number of layers from 1 on."


def count_recomputed(mode: str | int, num_layers: int) -> int:
    """Return how many of `num_layers` decoder layers recompute; `auto` counts as all of them."""
    if isinstance(mode, int):
        return min(mode, num_layers)
    return 0 if mode == "none" else num_layers
