"""The solvers on a GPU: Triton kernels that quantize a whole weight.

The kernels contain no constants of a solver. The constants are defined next to the torch code that
explains them and are passed to the kernels, so that the two implementations cannot drift apart.
"""

import functools
import logging

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
from hqqtrain.quant.solvers.registry import SOLVERS
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import Layout, backend
from hqqtrain_kernels.solver_params import (
    HQQParams,
    LeastSquaresParams,
    RTNParams,
    SolverParams,
)

logger = logging.getLogger(__name__)

MAX_GROUP_SIZE = 1 << 15
"""Largest group_size that fits into the registers of one program."""


def is_supported(device: torch.device, layout: Layout, spec: QuantSpec) -> bool:
    """Whether the kernel of the solver, not torch, quantizes a weight on `device`."""
    if not backend.use_triton(device):
        return False
    if not SOLVERS[spec.solver].has_kernel:
        _warn_no_kernel(spec.solver)
        return False
    if spec.zero != "float":
        _warn_no_kernel(f"{spec.solver} with quant.zero={spec.zero}")
        return False
    if layout.group_size > MAX_GROUP_SIZE:
        _warn_group_too_long(layout.group_size)
        return False
    return True


@functools.cache
def _warn_group_too_long(group_size: int) -> None:
    """Warn once for every group_size: `functools.cache` drops repetitions."""
    logger.warning(
        "groups of %d weights are too long for the kernel (at most %d); torch quantizes them, "
        "which is slower and gives the same bits",
        group_size, MAX_GROUP_SIZE,
    )  # fmt: skip


@functools.cache
def _warn_no_kernel(solver: str) -> None:
    """Warn once for every solver: `functools.cache` drops repetitions."""
    logger.warning(
        "solver %s has no kernel (%s have one); torch runs it, which is slower",
        solver,
        ", ".join(s.name for s in SOLVERS.values() if s.has_kernel),
    )


def quantize_with_triton(
    W: Tensor, layout: Layout, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize W with the kernel of its solver.

    Returns:
        W_q [units, unit_bytes], scale and zero [units, groups], and a bool tensor [1]: whether W
        contains NaN or infinity.
    """
    from hqqtrain_kernels import quantize_triton  # triton is absent on a Mac

    return quantize_triton.quantize(
        W=W,
        layout=layout,
        solver=spec.solver,
        params=_solver_params(spec.solver, spec.nbits, layout.group_size),
        meta_dtype=spec.meta_dtype,
    )


@functools.cache
def _solver_params(solver: str, nbits: int, group_size: int) -> SolverParams:
    """Return the constants of `solver` for its kernel.

    Raises:
        ValueError: The solver has no kernel.
    """
    if solver == "rtn":
        return RTNParams()
    if solver == "hqq":
        return HQQParams(
            rounds=HQQ_ROUNDS,
            beta=HQQ_BETA,
            p=HQQ_P,
            nudges=HQQ_NUDGES,
            bits=HQQ_BITS,
            shrunk_bits=HQQ_SHRUNK_BITS,
        )
    if solver == "least_squares":
        search = least_squares.search_config(nbits)
        return LeastSquaresParams(
            ranges_about_middle=search.ranges_about_middle,
            ranges_about_mean=search.ranges_about_mean,
            rounds=search.rounds,
            last_rounds=search.last_rounds,
            relaxation=search.relaxation,
            bits=least_squares.fraction_bits(nbits, group_size),
        )
    raise ValueError(f"solver={solver}: it has no kernel")
