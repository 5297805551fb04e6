"""Find NaN and Inf in the weights that are read, without waiting for the GPU at every weight.

A check runs on the GPU and its result must be copied to the host, which waits until the GPU has
computed it. The results are therefore read later, when the GPU is done with them.
"""

from collections import deque

from torch import Tensor

from hqqtrain.loading.prefetch import RowRange
from hqqtrain.models.weights.base import WeightSource
from hqqtrain.quant.quantize import not_finite_error

MAX_PENDING_CHECKS = 2
"""Number of results that are not read yet.

When two more checks are queued, the GPU has usually computed the oldest one, so reading it does not
wait.
"""


class DeferredFiniteCheck:
    """Collects the results of finite checks and reads them later.

    The caller must call `check` at the end, to read the last results.

    Args:
        reader: Reads rows again to name the one that is not finite.
    """

    def __init__(self, reader: WeightSource) -> None:
        self._reader = reader
        self._pending: deque[tuple[RowRange, Tensor]] = deque()

    def add(self, row_range: RowRange, not_finite: Tensor) -> None:
        """Record the result of a check, and read the oldest results.

        Args:
            row_range: The rows that were checked.
            not_finite: Tensor of one element, on any device, true if a row has NaN or Inf.

        Raises:
            UserError: See `check`.
        """
        self._pending.append((row_range, not_finite))
        self.check(max_pending=MAX_PENDING_CHECKS)

    def check(self, *, max_pending: int = 0) -> None:
        """Read the oldest results until `max_pending` are left. Synchronizes with the device.

        Raises:
            UserError: A row has NaN or Inf; the message names the tensor and the row.
        """
        while len(self._pending) > max_pending:
            row_range, not_finite = self._pending.popleft()
            if not_finite:  # converting to bool waits for the device
                raise not_finite_error(
                    self._reader.read(*row_range), row_range.name, row_range.rows
                )
