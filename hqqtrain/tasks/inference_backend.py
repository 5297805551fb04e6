"""`quant.backend` of another package: it takes over the layers of a model that is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager

from hqqtrain.common.errors import UserError
from hqqtrain.inference.backends.base import InferenceBackend
from hqqtrain.inference.backends.registry import BACKENDS
from hqqtrain.tasks.context import Run


def inference_backend(run: Run) -> InferenceBackend | None:
    """Return the backend of another package that the run asks for, if any.

    It is checked before any weight is read.

    Raises:
        UserError: It cannot be used here, or the ranks share the layers.
    """
    name, strategy = run.config.quant.inference_backend, run.runtime.strategy
    if name is None or not run.config.quant.quantizes:
        return None
    if strategy.shards_parameters:
        raise UserError(
            f"quant.backend={name}: needs whole layers, and parallel.strategy={strategy.name} "
            "shards them; use parallel.strategy=ddp or single, or quant.backend=auto."
        )
    with errors_name_the_key():
        BACKENDS[name].check_usable(run.runtime.device, run.runtime.dtype)
    return BACKENDS[name]


@contextmanager
def errors_name_the_key() -> Iterator[None]:
    """Let an error that begins with the argument `backend` begin with `quant.backend`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"quant.{error}") from error.__cause__
