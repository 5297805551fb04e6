"""Whether weights were finite, asked when nobody has to wait for the answer.

To ask at once, a GPU's queue would have to run empty: 0.1 ms, of the 0.2 to 0.6 that the largest
weight of a Llama-70B takes (H100).
"""

from collections import deque

from torch import Tensor

from hqqtrain.dist.ahead import Piece, Reader
from hqqtrain.quant import not_finite_error

LATER = 2
"""Answers that are left open: by then the first is there."""


class Finiteness:
    """Of pieces that `reader` has read. `check` raises UserError, naming tensor and row."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._open: deque[tuple[Piece, Tensor]] = deque()

    def add(self, piece: Piece, not_finite: Tensor) -> None:
        """`not_finite`: one number, on any device, that is true if the piece has such values."""
        self._open.append((piece, not_finite))
        self.check(LATER)

    def check(self, leave: int = 0) -> None:
        """Waits for all answers but the last `leave`."""
        while len(self._open) > leave:
            piece, not_finite = self._open.popleft()
            if not_finite:
                raise not_finite_error(self._reader.read(*piece), piece.name, piece.rows)
