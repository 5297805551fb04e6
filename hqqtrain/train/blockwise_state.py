"""bitsandbytes' optimizer states, saved and put back.

Each rank quantizes its own part of a moment, 256 numbers to a scale, unless it is small. Parts are
saved as they are, by their number, and come back bit for bit where a parameter is cut alike. Where
it is not, they go by way of fp32 and are quantized anew: a rounding of 8 bits, once.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hqqtrain.dist import Piece, owned_rows, piece_of, place_of

_MOMENTS = ("1", "2")
_BLOCK = 256
"""Numbers that share a scale (bitsandbytes, optim/optimizer.py, `init_state`)."""


def blockwise_pieces(
    name: str, param: nn.Parameter, state: Mapping[str, Any]
) -> Iterator[tuple[str, Piece]]:
    """(`name/key`, this rank's piece) of a parameter's state.

    The same keys on every rank: a part too small for 8 bits has no scales, and an empty one no
    state at all; they give empty tensors.
    """
    nothing = torch.empty(0)
    for moment in _MOMENTS:
        part, scales = (state.get(f"{key}{moment}", nothing) for key in ("state", "absmax"))
        yield f"{name}/state{moment}", piece_of(param, part.flatten())
        yield f"{name}/absmax{moment}", piece_of(param, scales)


def load_blockwise(
    optimizer: Optimizer, number: int, name: str, param: nn.Parameter,
    saved: Mapping[str, Tensor], step: int,
) -> None:  # fmt: skip
    """Puts back the state of the parameter `number` of `optimizer`, whose whole is `param`."""
    maker: Any = optimizer
    group = maker.param_groups[0]
    held = group["params"][number]
    maker.init_state(group, held, 0, number)
    state = maker.state[held]
    state["step"] = step
    place, parts = place_of(param)
    for moment in _MOMENTS:
        was = _saved(saved, f"{name}/state{moment}"), _saved(saved, f"{name}/absmax{moment}")
        if len(was[0]) == parts:
            _copy(state, moment, was[0][place], was[1][place])
        else:
            whole = _dequantized(*was, moment).view(param.shape)
            _fill(state, moment, whole[owned_rows(param)])


def _saved(saved: Mapping[str, Tensor], name: str) -> list[Tensor]:
    found: list[Tensor] = []
    while f"{name}/{len(found)}" in saved:
        found.append(saved[f"{name}/{len(found)}"])
    return found


def _copy(state: dict[str, Any], moment: str, part: Tensor, scales: Tensor) -> None:
    state[f"state{moment}"].copy_(part.view(state[f"state{moment}"].shape))
    if scales.numel():
        state[f"absmax{moment}"].copy_(scales)


def _fill(state: dict[str, Any], moment: str, values: Tensor) -> None:
    import bitsandbytes.functional as bnb

    part = state[f"state{moment}"]
    values = values.to(part.device).contiguous()
    if part.dtype == torch.uint8:
        code = state[f"qmap{moment}"]
        values, made = bnb.quantize_blockwise(values, code=code, blocksize=_BLOCK)
        state[f"absmax{moment}"].copy_(made.absmax)
    part.copy_(values.view(part.shape))


def _dequantized(parts: list[Tensor], scales: list[Tensor], moment: str) -> Tensor:
    """The whole moment in fp32, flat, on the host."""
    import bitsandbytes.functional as bnb

    code = bnb.create_dynamic_map(signed=moment == "1")  # as `fill_qmap` there
    return torch.cat([
        bnb.dequantize_blockwise(p.flatten(), absmax=s, code=code, blocksize=_BLOCK)
        if p.dtype == torch.uint8 else p.flatten()
        for p, s in zip(parts, scales, strict=True)
    ])  # fmt: skip
