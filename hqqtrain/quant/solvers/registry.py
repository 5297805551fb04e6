"""The solvers by name.

A solver is a pure function of every column: it stops per group or after a fixed number of rounds,
never on an average over the whole weight, so any slice of a weight gets the same bits.
"""

from collections.abc import Callable

from torch import Tensor

from hqqtrain.quant.grid import QuantGrid
from hqqtrain.quant.solvers.hqq import hqq
from hqqtrain.quant.solvers.least_squares import least_squares
from hqqtrain.quant.solvers.rtn import rtn

Solver = Callable[[Tensor, QuantGrid], tuple[Tensor, Tensor]]
"""(W [group_size, n] fp32, in units of the grid) -> scale [n] in units, zero [n]."""

SOLVERS: dict[str, Solver] = {"least_squares": least_squares, "hqq": hqq, "rtn": rtn}
