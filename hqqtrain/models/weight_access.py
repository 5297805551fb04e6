"""Find the linears whose weight a model's code reads itself, instead of calling them.

A quantized linear has no attribute `weight`, and an adapter on a linear that is not called trains
nothing. Mamba multiplies by `dt_proj.weight`, during training by others, too, and Gemma 3n clamps
weights during training.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def find_read_linears(
    model: nn.Module, call: Callable[[], object], *, trains: bool = True
) -> frozenset[str]:
    """Return the names of the linears whose weight is read outside of their own forward pass.

    Numbers in the names are replaced by `*`, so that a name stands for the same linear of all
    layers.

    Args:
        model: The model, in evaluation mode.
        call: Calls the model. Any exception ends the search in that mode.
        trains: Whether to call it in training mode, too.
    """
    with _watched_linears(model) as watched:
        for is_training in (False, True) if trains else (False,):
            model.train(is_training)
            try:
                with torch.random.fork_rng(devices=[]):
                    call()
            except Exception:  # the model's code may need other inputs in training mode
                continue
            finally:
                model.eval()
        return frozenset(without_numbers(n) for n, linear in watched.items() if linear.is_read)


def without_numbers(name: str) -> str:
    """Return the name of a module with `*` in place of every number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


class _WatchedLinear(nn.Linear):
    """Records whether its weight is read outside of its own forward pass."""

    is_called = is_read = False

    def forward(self, input: Tensor) -> Tensor:
        self.is_called = True
        try:
            return super().forward(input)
        finally:
            self.is_called = False

    def __getattr__(self, name: str) -> Any:
        # Parameters are no attributes of an instance, so this method finds them.
        if name == "weight" and not self.is_called:
            self.is_read = True
        return super().__getattr__(name)


@contextmanager
def _watched_linears(model: nn.Module) -> Iterator[dict[str, _WatchedLinear]]:
    """Make every linear of `model` a `_WatchedLinear`; yield them by name."""
    watched: dict[str, Any] = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    for linear in watched.values():
        linear.__class__ = _WatchedLinear
    try:
        yield watched
    finally:
        for linear in watched.values():
            linear.__class__ = nn.Linear
