"""Deferred check that source weights are finite, which does not synchronize with the GPU.

An immediate check would drain the GPU's queue. That costs 0.1 ms, where quantizing the largest
weight of a Llama-70B takes 0.2 to 0.6 ms (H100).
"""

from collections import deque

from torch import Tensor

from hqqtrain.dist.ahead import Piece, Reader
from hqqtrain.quant import not_finite_error

LATER = 2
"""Number of results that stay pending. By then the GPU has computed the oldest one."""


class Finiteness:
    """Collects the finite checks of pieces and reads their results later.

    Args:
        reader: Reads a piece again to name the row that is not finite.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._pending: deque[tuple[Piece, Tensor]] = deque()

    def add(self, piece: Piece, not_finite: Tensor) -> None:
        """Record the result of a check, and read the results that are old enough.

        Args:
            piece: The rows that were checked.
            not_finite: Tensor of one element, on any device, true if the piece has NaN or Inf.

        Raises:
            UserError: See `check`.
        """
        self._pending.append((piece, not_finite))
        self.check(LATER)

    def check(self, leave: int = 0) -> None:
        """Read all pending results but the last `leave`.

        Raises:
            UserError: A piece has NaN or Inf; the message names the tensor and the row.
        """
        while len(self._pending) > leave:
            piece, not_finite = self._pending.popleft()
            if not_finite:
                raise not_finite_error(self._reader.read(*piece), piece.name, piece.rows)
