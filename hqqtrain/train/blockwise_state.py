"""Save and load bitsandbytes' 8-bit optimizer states.

Each rank quantizes its own shard of a moment in blocks of 256 elements with one scale (`absmax`)
each; small tensors stay in fp32. Blocks do not align with the shards of another world size, so the
shards are saved as they are, numbered. If a parameter is sharded as before, they are loaded bit for
bit. Otherwise the moment is dequantized to fp32, sharded again and quantized again, which costs one
8-bit rounding.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hqqtrain.dist import Piece, owned_rows, piece_of, place_of

_MOMENTS = ("1", "2")
"""AdamW's first and second moment, as bitsandbytes numbers them: state1, absmax1, qmap1, ..."""

_BLOCK = 256
"""Elements that share a scale (bitsandbytes, optim/optimizer.py, `init_state`)."""


def blockwise_pieces(
    name: str, param: nn.Parameter, state: Mapping[str, Any]
) -> Iterator[tuple[str, Piece]]:
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
        yield f"{name}/state{moment}", piece_of(param, part.flatten())
        yield f"{name}/absmax{moment}", piece_of(param, scales)


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
    shard_index, shard_count = place_of(param)
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
            _quantize_into(state, moment, full[owned_rows(param)])


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
