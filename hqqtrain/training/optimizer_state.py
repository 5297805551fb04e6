"""Save and load the optimizer's state by parameter name, for any number of ranks.

PyTorch's AdamW keeps tensors of the parameter's shape. They are saved as full tensors, which any
world size can shard again. bitsandbytes quantizes each shard in its own blocks. So its shards are
saved one by one, and are quantized again if the world size changes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hqqtrain.distributed.gather import LocalShard, local_shard_of, shard_index_and_count
from hqqtrain.distributed.local import copy_from_full, local_rows, local_tensor

_ADAMW_KEYS = ("exp_avg", "exp_avg_sq")
"""Keys of the moments in the state of PyTorch's AdamW."""


class OptimizerState:
    """The state of an optimizer, by the names of its parameters.

    Args:
        optimizer: From `build_optimizer`.
        parameters: The parameters that it was built for, by name.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        self._optimizer, self._params_by_name = optimizer, parameters
        # The same parameters as the optimizer has them: under bitsandbytes, this rank's shards.
        self._optimized: list[nn.Parameter] = optimizer.param_groups[0]["params"]

    def clear(self) -> None:
        """Drop the state, as before the first step."""
        self._optimizer.state.clear()

    @property
    def step(self) -> int:
        """Number of steps taken; those that fp16's gradient scaler has skipped do not count."""
        counts = [torch.as_tensor(state["step"]) for state in self._optimizer.state.values()]
        # The counts of fused AdamW are on the device: copy them to the host together.
        return int(torch.stack(counts).max()) if counts else 0

    def local_shards(self) -> Iterator[tuple[str, LocalShard]]:
        """Yield (`name/key`, this rank's shard), with the same names on every rank."""
        for (name, param), optimized in zip(
            self._params_by_name.items(), self._optimized, strict=True
        ):
            state = self._optimizer.state.get(optimized, {})
            if not isinstance(self._optimizer, AdamW):
                yield from blockwise_shards(name, param, state)
                continue
            for key in _ADAMW_KEYS:
                if key in state:  # absent before the first step
                    shard = local_shard_of(param, local_tensor(state[key]), param.shape)
                    yield f"{name}/{key}", shard

    def load(self, saved: Mapping[str, Tensor], step: int) -> None:
        """Load the full tensors that were saved after `step` steps, by name."""
        self._optimizer.state.clear()
        if not step:
            return
        for index, (name, param) in enumerate(self._params_by_name.items()):
            if isinstance(self._optimizer, AdamW):
                device = param.device if self._optimizer.param_groups[0]["fused"] else "cpu"
                state: dict[str, Any] = {"step": torch.tensor(float(step), device=device)}
                for key in _ADAMW_KEYS:
                    state[key] = torch.zeros_like(param, requires_grad=False)
                    copy_from_full(state[key], saved[f"{name}/{key}"])
                self._optimizer.state[param] = state
            else:
                load_blockwise(self._optimizer, index, name, param, saved, step)


_BNB_MOMENTS = ("1", "2")
"""AdamW's first and second moment, as bitsandbytes numbers them: state1, absmax1, qmap1, ..."""

_BNB_BLOCK_SIZE = 256
"""Number of elements that share a scale (bitsandbytes, optim/optimizer.py, `init_state`)."""


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
    for moment in _BNB_MOMENTS:
        values = state.get(f"state{moment}", nothing)
        scales = state.get(f"absmax{moment}", nothing)
        yield f"{name}/state{moment}", local_shard_of(param, values.flatten())
        yield f"{name}/absmax{moment}", local_shard_of(param, scales)


def load_blockwise(
    optimizer: Optimizer, index: int, name: str, param: nn.Parameter,
    saved: Mapping[str, Tensor], step: int,
) -> None:  # fmt: skip
    """Load the saved state of one parameter into `optimizer`.

    Args:
        optimizer: A new bitsandbytes optimizer, over this rank's shards.
        index: Index of the parameter's shard in the optimizer.
        name: Name of the parameter.
        param: The parameter itself, sharded or not.
        saved: All saved shards of the parameter, by `name/key/shard index`.
        step: Number of steps that the saved optimizer had taken.
    """
    # Let bitsandbytes allocate the state of the shard: 8 bits or, if it is small, fp32.
    bnb_optimizer: Any = optimizer
    group = bnb_optimizer.param_groups[0]
    shard = group["params"][index]
    bnb_optimizer.init_state(group, shard, 0, index)
    state = bnb_optimizer.state[shard]
    state["step"] = step
    shard_index, shard_count = shard_index_and_count(param)
    for moment in _BNB_MOMENTS:
        saved_values = _saved_shards(saved, f"{name}/state{moment}")
        saved_scales = _saved_shards(saved, f"{name}/absmax{moment}")
        if len(saved_values) == shard_count:
            # The sharding is the same: copy values and scales. Only 8-bit values have scales.
            values = state[f"state{moment}"]
            values.copy_(saved_values[shard_index].view(values.shape))
            if saved_scales[shard_index].numel():
                state[f"absmax{moment}"].copy_(saved_scales[shard_index])
        else:
            # The sharding differs: join the shards in fp32 and quantize this rank's rows again.
            full = _dequantize(saved_values, saved_scales, moment).view(param.shape)
            _quantize_into(state, moment, full[local_rows(param)])


def _saved_shards(saved: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Return the tensors `name/0`, `name/1`, ..., as many as there are."""
    shards: list[Tensor] = []
    while f"{name}/{len(shards)}" in saved:
        shards.append(saved[f"{name}/{len(shards)}"])
    return shards


def _quantize_into(state: dict[str, Any], moment: str, values: Tensor) -> None:
    """Write fp32 `values` into the moment, in the dtype that bitsandbytes has allocated."""
    import bitsandbytes.functional as bnb

    target = state[f"state{moment}"]
    values = values.to(target.device).contiguous()
    if target.dtype == torch.uint8:
        code = state[f"qmap{moment}"]
        values, quant_state = bnb.quantize_blockwise(values, code=code, blocksize=_BNB_BLOCK_SIZE)
        state[f"absmax{moment}"].copy_(quant_state.absmax)
    target.copy_(values.view(target.shape))


def _dequantize(shards: list[Tensor], scales: list[Tensor], moment: str) -> Tensor:
    """Join the saved shards of a moment; return it in fp32, flat, on the host."""
    import bitsandbytes.functional as bnb

    # The code book of bitsandbytes (`fill_qmap`): the first moment is signed, the second is not.
    code = bnb.create_dynamic_map(signed=moment == "1")
    return torch.cat([
        bnb.dequantize_blockwise(shard.flatten(), absmax=s, code=code, blocksize=_BNB_BLOCK_SIZE)
        if shard.dtype == torch.uint8 else shard.flatten()
        for shard, s in zip(shards, scales, strict=True)
    ])  # fmt: skip
