"""Fit the scales and minima of Q4_K and Q2_K to ours, with the codes fixed.

A weight of a super-block of 256 is d * scale * code - d_min * minimum, where d and d_min are fp16,
and scale and minimum are small integers of its sub-block. Ours is s * code - s * zero. First d and
scale are fitted to s. Each minimum then gets the value that keeps the mean of its sub-block, which
makes up for most of the error of the scale, and d_min and minimum are fitted to these values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hqqtrain.formats.layers import PackedLayer

SUPER_BLOCK = 256

_CHUNK = 2**22
"""Number of weights whose super-blocks are fitted at once, which bounds the memory."""


class SuperBlocks(NamedTuple):
    """The numbers that a type of super-blocks stores beside the codes.

    Attributes:
        d: fp16 [rows, super-blocks].
        d_min: fp16 [rows, super-blocks].
        scale: uint8 [rows, super-blocks, sub-blocks].
        minimum: uint8 [rows, super-blocks, sub-blocks].
    """

    d: Tensor
    d_min: Tensor
    scale: Tensor
    minimum: Tensor


def fit_super_blocks(layer: PackedLayer, sub_block_size: int, levels: int) -> SuperBlocks:
    """Fit super-blocks to a layer.

    Args:
        layer: A layer with groups along its rows, which are multiples of `sub_block_size`.
        sub_block_size: The number of weights in a sub-block.
        levels: The largest scale and minimum.
    """
    rows = max(1, _CHUNK // layer.layout.in_features)
    repeats = layer.layout.group_size // sub_block_size
    means = layer.codes.unflatten(1, (-1, sub_block_size)).float().mean(-1)
    chunks = zip(
        layer.scale.float().split(rows), layer.zero.float().split(rows), means.split(rows),
        strict=True,
    )  # fmt: skip
    fitted = [_fit(*chunk, repeats, SUPER_BLOCK // sub_block_size, levels) for chunk in chunks]
    return SuperBlocks(*(torch.cat(parts) for parts in zip(*fitted, strict=True)))


def _fit(
    scale: Tensor, zero: Tensor, means: Tensor, repeats: int, sub_blocks: int, levels: int
) -> SuperBlocks:
    """Fit some rows; `means` are the mean codes of the sub-blocks, `repeats` those in a group."""
    s, z = (x.repeat_interleave(repeats, 1).unflatten(1, (-1, sub_blocks)) for x in (scale, zero))
    d, scale_codes = _fit_multiples(s, levels)
    change = d.float()[..., None] * scale_codes - s
    d_min, minimum_codes = _fit_multiples(s * z + change * means.view_as(s), levels)
    return SuperBlocks(d, d_min, scale_codes, minimum_codes)


def _fit_multiples(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return d, fp16 [...], and integers i up to `levels`, uint8 [..., n], with d * i near values.

    The search tries to make the largest value different multiples of d, and refines each d by least
    squares. The powers of two among them make equal values exact.

    Args:
        values: fp32 [..., n]. Those whose sign is not that of the largest become 0.
        levels: The largest integer.
    """
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    best_error = torch.full_like(largest, torch.inf)
    best_d, best_codes = torch.zeros_like(largest), torch.zeros_like(values)
    step = 0.25 if levels < 32 else 1.0
    for multiple in (1.0, *torch.arange((levels + 1) / 2, levels + step / 2, step).tolist()):
        d = (largest / multiple).half().float()
        codes = _nearest(values, d, levels)
        for candidate in (d, _least_squares(values, codes)):
            error = (values - candidate * codes).square().sum(-1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_d = torch.where(better, candidate, best_d)
            best_codes = torch.where(better, codes, best_codes)
    return best_d[..., 0].half(), best_codes.to(torch.uint8)


def _nearest(values: Tensor, d: Tensor, levels: int) -> Tensor:
    """Return the integers from 0 to `levels` whose multiples of `d` are nearest to `values`."""
    return torch.where(d == 0, 0, values / d).round().clamp(0, levels)


def _least_squares(values: Tensor, codes: Tensor) -> Tensor:
    """Return the d that fits `values` best with these codes, rounded to fp16."""
    norm = codes.square().sum(-1, keepdim=True)
    d = (values * codes).sum(-1, keepdim=True) / norm.clamp_min(1.0)
    return d.half().float()
