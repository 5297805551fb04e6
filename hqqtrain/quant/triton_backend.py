"""The solvers on a GPU: kernels that quantize a whole weight, with the numbers of the torch ones.

The kernels know no solver's numbers: these stand beside the torch code that explains them, and
are handed down, so that the two cannot drift apart.
"""

import functools
import logging
from dataclasses import astuple

import torch
from torch import Tensor

from hqqtrain.quant.solvers import least_squares
from hqqtrain.quant.solvers.hqq import (
    HQQ_BETA,
    HQQ_BITS,
    HQQ_NUDGES,
    HQQ_P,
    HQQ_ROUNDS,
    HQQ_SHRUNK_BITS,
)
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import Layout, select

logger = logging.getLogger(__name__)

LARGEST_GROUP = 1 << 15
"""Weights that the registers of one program can hold."""


def is_supported(device: torch.device, layout: Layout) -> bool:
    """Whether a weight on `device` is quantized by the kernel."""
    if not select.runs_triton(device):
        return False
    if layout.group_size > LARGEST_GROUP:
        _warn_of(layout.group_size)
        return False
    return True


@functools.cache
def _warn_of(group_size: int) -> None:
    logger.warning(
        "groups of %d are too long for the kernel (at most %d): quantized by torch, which is "
        "slower and gives the same bits",
        group_size, LARGEST_GROUP,
    )  # fmt: skip


def quantize_with_triton(
    W: Tensor, layout: Layout, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_q [units, row_bytes], scale and zero [units, groups]; [1]: does W hold NaN or infinity?"""
    from hqqtrain_kernels import quantize_triton  # triton is absent on a Mac

    method = quantize_triton.Method(
        spec.solver, _numbers(spec.solver, spec.nbits, layout.group_size)
    )
    return quantize_triton.quantize(W, layout, method, spec.meta_dtype)


@functools.cache
def _numbers(solver: str, nbits: int, group_size: int) -> tuple:
    if solver == "hqq":
        return (
            HQQ_ROUNDS, HQQ_BETA, HQQ_P, HQQ_NUDGES,
            HQQ_BITS, HQQ_SHRUNK_BITS,
        )  # fmt: skip
    if solver == "least_squares":
        bits = least_squares.fraction_bits(nbits, group_size)
        return (*astuple(least_squares.search_config(nbits)), bits)
    return ()
