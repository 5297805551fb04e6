"""Round to nearest: the simplest solver, and the baseline of the others."""

from torch import Tensor

from hqqtrain.quant.grid import QuantGrid, group_ranges


def rtn(W: Tensor, grid: QuantGrid) -> tuple[Tensor, Tensor]:
    """Return the scale and zero with which the codes span the range of every group.

    Args:
        W: Groups as columns, fp32 [group_size, n], normalized.
        grid: The codes, and the storage dtype of scale and zero.

    Returns:
        The normalized scale [n] and the zero [n]: minimum and maximum of a group get the lowest and
        the highest code.
    """
    low, value_range = group_ranges(W)
    # Multiply by the reciprocal instead of dividing, because the kernel does: both round alike.
    scale = value_range * (1 / grid.max_code)
    return scale, -low / scale
