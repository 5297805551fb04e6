"""Save and load the optimizer's state by parameter name, for any number of ranks.

PyTorch's AdamW keeps tensors of the parameter's shape. They are saved as full tensors, which any
world size can shard again. bitsandbytes' states need more care, see `blockwise_shards`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hqqtrain.distributed.gather import LocalShard, local_shard_of, shard_index_and_count
from hqqtrain.distributed.local import copy_from_full, local_rows, local_tensor

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

    def local_shards(self) -> Iterator[tuple[str, LocalShard]]:
        """Yield (`name/key`, this rank's shard), with the same names on every rank."""
        for (name, param), optimized in zip(self._named.items(), self._optimized, strict=True):
            state = self._optimizer.state.get(optimized, {})
            if not isinstance(self._optimizer, AdamW):
                yield from blockwise_shards(name, param, state)
            for key in _KEYS:
                if key in state:
                    yield (
                        f"{name}/{key}",
                        local_shard_of(param, local_tensor(state[key]), param.shape),
                    )

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
                    copy_from_full(state[key], saved[f"{name}/{key}"])
                self._optimizer.state[param] = state
            else:
                load_blockwise(self._optimizer, number, name, param, saved, step)


_MOMENTS = ("1", "2")
"""AdamW's first and second moment, as bitsandbytes numbers them: state1, absmax1, qmap1, ..."""

_BLOCK = 256
"""Elements that share a scale (bitsandbytes, optim/optimizer.py, `init_state`)."""


def blockwise_shards(
    name: str, param: nn.Parameter, state: Mapping[str, Any]
) -> Iterator[tuple[str, LocalShard]]:
    """Yield (`name/key`, this rank's shard) for the state of one parameter.

    The keys are the same on every rank, as gathering requires. A shard too small for 8 bits has no
    scales, and an empty shard has no state at all: both yield empty tensors.

    Args:
        name: Name of the parameter.
        param: The parameter, sharded or not.
        state: Its entry in the optimizer's state.
    """
    nothing = torch.empty(0)
    for moment in _MOMENTS:
        part = state.get(f"state{moment}", nothing)
        scales = state.get(f"absmax{moment}", nothing)
        yield f"{name}/state{moment}", local_shard_of(param, part.flatten())
        yield f"{name}/absmax{moment}", local_shard_of(param, scales)


def load_blockwise(
    optimizer: Optimizer, number: int, name: str, param: nn.Parameter,
    saved: Mapping[str, Tensor], step: int,
) -> None:  # fmt: skip
    """Load the saved state of one parameter into `optimizer`.

    Args:
        optimizer: A new bitsandbytes optimizer, over this rank's shards.
        number: Index of the parameter's shard in the optimizer.
        name: Name of the parameter.
        param: The parameter itself, sharded or not.
        saved: Saved shards by `name/key/shard number`, with all shards of the parameter.
        step: Steps that the saved optimizer had taken.
    """
    # Let bitsandbytes allocate the state of the shard: 8 bits or, if it is small, fp32.
    bnb_optimizer: Any = optimizer
    group = bnb_optimizer.param_groups[0]
    shard = group["params"][number]
    bnb_optimizer.init_state(group, shard, 0, number)
    state = bnb_optimizer.state[shard]
    state["step"] = step
    shard_index, shard_count = shard_index_and_count(param)
    for moment in _MOMENTS:
        parts = _saved_shards(saved, f"{name}/state{moment}")
        scales = _saved_shards(saved, f"{name}/absmax{moment}")
        if len(parts) == shard_count:
            # Sharded as before: copy codes and scales. Only quantized shards have scales.
            target = state[f"state{moment}"]
            target.copy_(parts[shard_index].view(target.shape))
            if scales[shard_index].numel():
                state[f"absmax{moment}"].copy_(scales[shard_index])
        else:
            # Sharded differently: join the shards in fp32 and quantize this rank's rows again.
            full = _dequantize(parts, scales, moment).view(param.shape)
            _quantize_into(state, moment, full[local_rows(param)])


def _saved_shards(saved: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Return `name/0`, `name/1`, ... as far as they exist."""
    shards: list[Tensor] = []
    while f"{name}/{len(shards)}" in saved:
        shards.append(saved[f"{name}/{len(shards)}"])
    return shards


def _quantize_into(state: dict[str, Any], moment: str, values: Tensor) -> None:
    """Write fp32 `values` into the moment, in the dtype that bitsandbytes has allocated."""
    import bitsandbytes.functional as bnb

    part = state[f"state{moment}"]
    values = values.to(part.device).contiguous()
    if part.dtype == torch.uint8:
        code = state[f"qmap{moment}"]
        values, quant_state = bnb.quantize_blockwise(values, code=code, blocksize=_BLOCK)
        state[f"absmax{moment}"].copy_(quant_state.absmax)
    part.copy_(values.view(part.shape))


def _dequantize(parts: list[Tensor], scales: list[Tensor], moment: str) -> Tensor:
    """Return the full moment in fp32, flat, on the host."""
    import bitsandbytes.functional as bnb

    # bitsandbytes' own code (`fill_qmap`): the first moment is signed, the second is not.
    code = bnb.create_dynamic_map(signed=moment == "1")
    return torch.cat([
        bnb.dequantize_blockwise(p.flatten(), absmax=s, code=code, blocksize=_BLOCK)
        if p.dtype == torch.uint8 else p.flatten()
        for p, s in zip(parts, scales, strict=True)
    ])  # fmt: skip
