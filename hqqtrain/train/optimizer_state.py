"""Save and load the optimizer's state by parameter name, for any number of ranks.

PyTorch's AdamW keeps tensors of the parameter's shape. They are saved as full tensors, which any
world size can shard again. bitsandbytes' states need more care, see `blockwise_state.py`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hqqtrain.dist import Piece, local, piece_of, write_full
from hqqtrain.train.blockwise_state import blockwise_pieces, load_blockwise

_KEYS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's moments."""


class OptimizerState:
    """State of `optimizer`, as `build_optimizer` makes it, for the parameters `named`."""

    def __init__(self, optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        self._optimizer, self._named = optimizer, named
        # The parameters as the optimizer has them: under bitsandbytes, this rank's shards.
        self._optimized: list[nn.Parameter] = optimizer.param_groups[0]["params"]

    @property
    def step(self) -> int:
        """Number of steps taken, without those that fp16's loss scaling has skipped."""
        return max((int(state["step"]) for state in self._optimizer.state.values()), default=0)

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Yield (`name/key`, this rank's shard), with the same names on every rank."""
        for (name, param), optimized in zip(self._named.items(), self._optimized, strict=True):
            state = self._optimizer.state.get(optimized, {})
            if not isinstance(self._optimizer, AdamW):
                yield from blockwise_pieces(name, param, state)
            for key in _KEYS:
                if key in state:
                    yield f"{name}/{key}", piece_of(param, local(state[key]), param.shape)

    def load(self, saved: Mapping[str, Tensor], step: int) -> None:
        """Load the full tensors that were saved after `step` steps, by name."""
        self._optimizer.state.clear()
        if not step:
            return
        for number, (name, param) in enumerate(self._named.items()):
            if isinstance(self._optimizer, AdamW):
                state: dict[str, Any] = {"step": torch.tensor(float(step))}
                for key in _KEYS:
                    state[key] = torch.zeros_like(param, requires_grad=False)
                    write_full(state[key], saved[f"{name}/{key}"])
                self._optimizer.state[param] = state
            else:
                load_blockwise(self._optimizer, number, name, param, saved, step)
