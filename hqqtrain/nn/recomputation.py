"""Whether a checkpointed layer is being computed again for its backward pass.

Modules that know it can skip a product whose result nobody needs, and keep what the backward pass
needs at once.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class _State(threading.local):
    """The state of one thread: autograd recomputes in a thread of its own for each GPU."""

    is_recomputing = False


_STATE = _State()


def is_recomputing() -> bool:
    """Whether this thread computes a checkpointed function again, directly before its backward."""
    return _STATE.is_recomputing


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a checkpointed function: of its forward pass and its recomputation.

    This is a `context_fn` of `torch.utils.checkpoint.checkpoint`.
    """
    return nullcontext(), _recomputation()


@contextmanager
def _recomputation() -> Iterator[None]:
    outer, _STATE.is_recomputing = _STATE.is_recomputing, True
    try:
        yield
    finally:  # PyTorch stops a recomputation with an exception as soon as it has every tensor
        _STATE.is_recomputing = outer
