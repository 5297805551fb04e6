"""Find NaN and Inf in the weights that are read, without waiting for the GPU at every weight."""

from collections import deque

from torch import Tensor

from hqqtrain.loading.prefetch import RowRange
from hqqtrain.models.weights.base import WeightSource
from hqqtrain.quant.quantize import not_finite_error

MAX_PENDING_CHECKS = 2
"""Number of results that stay pending. By then the GPU has computed the oldest one."""


class DeferredFiniteCheck:
    """Collects the finite checks of pieces and reads their results later.

    Args:
        reader: Reads a piece again to name the row that is not finite.
    """

    def __init__(self, reader: WeightSource) -> None:
        self._reader = reader
        self._pending: deque[tuple[RowRange, Tensor]] = deque()

    def add(self, piece: RowRange, not_finite: Tensor) -> None:
        """Record the result of a check, and read the results that are old enough.

        Args:
            piece: The rows that were checked.
            not_finite: Tensor of one element, on any device, true if the piece has NaN or Inf.

        Raises:
            UserError: See `check`.
        """
        self._pending.append((piece, not_finite))
        self.check(MAX_PENDING_CHECKS)

    def check(self, leave: int = 0) -> None:
        """Read all pending results but the last `leave`.

        Raises:
            UserError: A piece has NaN or Inf; the message names the tensor and the row.
        """
        while len(self._pending) > leave:
            piece, not_finite = self._pending.popleft()
            if not_finite:
                raise not_finite_error(self._reader.read(*piece), piece.name, piece.rows)
