"""Rotary embeddings whose frequencies depend on the length of the text.

With the types `dynamic` and `longrope`, a text longer than the original context length has other
frequencies than a shorter one. transformers computes them from the longest sequence of a batch. So
a text must share no batch with a longer one if its own frequencies differ (`max_batched_length`).

With `dynamic`, transformers also keeps the frequencies of the longest sequence so far, and
uses them for later, shorter ones. The loss of a text would then depend on earlier batches.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn


def reset_dynamic_rope(model: nn.Module) -> None:
    """Let the `dynamic` embeddings of `model` compute each batch as if it were their first."""
    for module in model.modules():
        prefixes = [prefix for prefix, kind in _rope_types(module) if "dynamic" in kind]
        if prefixes:
            module.register_forward_pre_hook(
                lambda rope, _, prefixes=prefixes: _forget_longest(rope, prefixes)
            )


def max_batched_length(model: nn.Module) -> int | None:
    """Return the length in tokens up to which all texts have the same frequencies.

    Return None if the length of a text does not change them.
    """
    lengths = [
        _original_length(module, prefix.removesuffix("_"))
        for module in model.modules()
        for prefix, kind in _rope_types(module)
        if "dynamic" in kind or kind == "longrope"
    ]
    return min(lengths, default=None)


def _rope_types(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the prefix of the buffers' names and the type of each embedding in `module`.

    Models with several kinds of attention have one embedding for each, named after the kind.
    """
    kinds: Any = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield "", kinds
    elif isinstance(kinds, dict):
        yield from ((f"{layer_type}_", kind) for layer_type, kind in kinds.items())


def _forget_longest(rope: Any, prefixes: list[str]) -> None:
    """Restore the frequencies and the length with which `rope` was built."""
    for prefix in prefixes:
        setattr(rope, f"{prefix}inv_freq", getattr(rope, f"{prefix}original_inv_freq"))
        setattr(rope, f"{prefix}max_seq_len_cached", rope.original_max_seq_len)


def _original_length(rope: Any, layer_type: str) -> int:
    """Return the length in tokens above which the frequencies of `rope` change."""
    parameters = rope.config.rope_parameters
    if layer_type:
        parameters = parameters[layer_type]
    is_longrope = parameters["rope_type"] == "longrope"
    return (
        parameters["original_max_position_embeddings"] if is_longrope else rope.original_max_seq_len
    )
