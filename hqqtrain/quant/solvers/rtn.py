"""Round to nearest: the simplest solver, and the baseline of the others."""

from torch import Tensor

from hqqtrain.quant.grid import QuantGrid, group_ranges


def rtn(W: Tensor, grid: QuantGrid) -> tuple[Tensor, Tensor]:
    """Round to nearest: the codes span the group's range."""
    low, width = group_ranges(W)
    scale = width * (1 / grid.max_code)
    return scale, -low / scale
