"""The optimizer's state by the names of what is trained, to be saved and put back.

PyTorch's AdamW keeps tensors of a parameter's shape, so they are saved whole and can be cut for any
number of ranks. bitsandbytes' is another matter: `blockwise_state.py`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hqqtrain.dist import Piece, local, piece_of, write_full
from hqqtrain.train.blockwise_state import blockwise_pieces, load_blockwise

_KEYS = ("exp_avg", "exp_avg_sq")


class OptimizerState:
    """State of `optimizer`, as `build_optimizer` makes it, for the parameters `named`."""

    def __init__(self, optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        self._optimizer, self._named = optimizer, named
        # of bitsandbytes, this rank's parts
        self._held: list[nn.Parameter] = optimizer.param_groups[0]["params"]

    @property
    def step(self) -> int:
        """Steps taken; those that fp16 has skipped are not counted."""
        return max((int(state["step"]) for state in self._optimizer.state.values()), default=0)

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """(`name/key`, this rank's piece): the same names on every rank."""
        for (name, param), held in zip(self._named.items(), self._held, strict=True):
            state = self._optimizer.state.get(held, {})
            if not isinstance(self._optimizer, AdamW):
                yield from blockwise_pieces(name, param, state)
            for key in _KEYS:
                if key in state:
                    yield f"{name}/{key}", piece_of(param, local(state[key]), param.shape)

    def load(self, saved: Mapping[str, Tensor], step: int) -> None:
        """Puts back what was saved after `step` steps, by its names."""
        self._optimizer.state.clear()
        if not step:
            return
        for number, (name, param) in enumerate(self._named.items()):
            if isinstance(self._optimizer, AdamW):
                self._optimizer.state[param] = _whole(name, param, saved, step)
            else:
                load_blockwise(self._optimizer, number, name, param, saved, step)


def _whole(
    name: str, param: nn.Parameter, saved: Mapping[str, Tensor], step: int
) -> dict[str, Any]:
    state: dict[str, Any] = {"step": torch.tensor(float(step))}
    for key in _KEYS:
        state[key] = torch.zeros_like(param, requires_grad=False)
        write_full(state[key], saved[f"{name}/{key}"])
    return state
