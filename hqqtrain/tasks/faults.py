"""Errors of memory and disk space become messages that tell the user what to change."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hqqtrain.config import RunConfig, UserError
from hqqtrain.models import oom_advice


@contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Translate out-of-memory and disk-full errors into UserError; pass on all other errors.

    Raises:
        UserError: Memory or disk space ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU allocator of PyTorch raises a plain RuntimeError.
        is_out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_out_of_memory and "DefaultCPUAllocator: can't allocate memory" not in str(error):
            raise
        raise UserError(f"{oom_advice(config)} ({error})") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"run.root={config.run.root}: the disk is full ({error}). Free some space; the same "
            "command resumes the run."
        ) from error
