"""The solvers by name.

A solver is a pure function of every group. It stops per group or after a fixed number of rounds,
never on an average over the whole weight, so any slice of a weight gets the same bits.

To add a solver, write it in a file of its own, register it here, and add its name to
`hqqtrain.config.quant.SOLVERS`, which the command line reads without torch. A solver without a
kernel runs in torch, also on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hqqtrain.quant.grid import QuantGrid
from hqqtrain.quant.solvers.hqq import hqq
from hqqtrain.quant.solvers.least_squares import least_squares
from hqqtrain.quant.solvers.rtn import rtn


@dataclass(frozen=True)
class Solver:
    """An algorithm that fits scale and zero of every group.

    Attributes:
        name: The value of `quant.solver`.
        solve: The torch implementation for weights whose inputs are unknown. It takes normalized
            groups W [group_size, n], fp32, and the grid, which explains "normalized". It returns
            the normalized scale [n] and the zero [n].
        has_kernel: Whether a Triton kernel computes the same bits as `solve` on a GPU.
        calibrates: Whether the solver uses the inputs of a layer if they are known; see
            `hqqtrain.quant.calibrated`.
        has_feedback: Whether it passes the error of a column on to later columns, too.
    """

    name: str
    solve: Callable[[Tensor, QuantGrid], tuple[Tensor, Tensor]]
    has_kernel: bool = False
    calibrates: bool = False
    has_feedback: bool = False


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("least_squares", least_squares, has_kernel=True, calibrates=True),
        Solver("gptq", least_squares, has_kernel=True, calibrates=True, has_feedback=True),
        Solver("hqq", hqq, has_kernel=True),
        Solver("rtn", rtn, has_kernel=True),
    )
}
"""The solvers, by the values of `quant.solver`."""
