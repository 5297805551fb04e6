"""The solvers on a GPU: Triton kernels that quantize a whole weight.

The kernels contain no constants of a solver. The constants are defined next to the torch code that
explains them and are passed to the kernels, so that the two implementations cannot drift apart.
"""

import functools
import logging
from dataclasses import astuple

import torch
from torch import Tensor

from hqqtrain.quant import least_squares, solvers
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import Layout, select

logger = logging.getLogger(__name__)

LARGEST_GROUP = 1 << 15
"""Largest group_size that fits into the registers of one program."""


def runs(device: torch.device, layout: Layout) -> bool:
    """Whether the kernel, not torch, quantizes a weight on `device`."""
    if not select.runs_triton(device):
        return False
    if layout.group_size > LARGEST_GROUP:
        _warn_group_too_long(layout.group_size)
        return False
    return True


@functools.cache
def _warn_group_too_long(group_size: int) -> None:
    """Warn once for every group_size: `functools.cache` drops repetitions."""
    logger.warning(
        "groups of %d weights are too long for the kernel (at most %d); torch quantizes them, "
        "which is slower and gives the same bits",
        group_size, LARGEST_GROUP,
    )  # fmt: skip


def quantize(W: Tensor, layout: Layout, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize W with the kernel of its solver.

    Returns:
        W_q [units, row_bytes], scale and zero [units, groups], and a bool tensor [1]: whether W
        contains NaN or infinity.
    """
    from hqqtrain_kernels import quantize_triton  # triton is absent on a Mac

    constants = _solver_constants(spec.solver, spec.nbits, layout.group_size)
    method = quantize_triton.Method(spec.solver, constants)
    return quantize_triton.quantize(W, layout, method, spec.meta_dtype)


@functools.cache
def _solver_constants(solver: str, nbits: int, group_size: int) -> tuple:
    """Return the constants of `solver` in the order that its kernel unpacks them."""
    if solver == "hqq":
        return (
            solvers.HQQ_ROUNDS, solvers.HQQ_BETA, solvers.HQQ_P, solvers.HQQ_NUDGES,
            solvers.HQQ_BITS, solvers.HQQ_SHRUNK_BITS,
        )  # fmt: skip
    if solver == "least_squares":
        bits = least_squares.fraction_bits(nbits, group_size)
        return (*astuple(least_squares.search(nbits)), bits)
    return ()
