"""Running out of memory or of disk: what a user can do about it, in place of a traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.loading.memory_check import oom_advice


@contextmanager
def translate_resource_errors(config: RunConfig) -> Iterator[None]:
    """Makes these a UserError; lets everything else pass."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(f"{oom_advice(config)} ({error})") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"run.root={config.run.root}: the disk is full ({error}). Make room there; the same "
            "command goes on."
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator raises a plain RuntimeError."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator: can't allocate memory" in str(error)
