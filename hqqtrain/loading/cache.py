"""Cache of quantized weights, shared by runs with the same source and the same quantization.

Without it, a sweep over adapters or jobs on many nodes would quantize the same model again and
again. An entry is a folder like `quantized/`, named by a hash of its inputs; it is complete or
absent. A run that needs an entry while another run writes it waits for the other run.
"""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from hqqtrain import __version__
from hqqtrain.common.errors import UserError
from hqqtrain.common.filelock import check_shared_lock, read_lock_token, try_lock
from hqqtrain.common.files import stat_digest
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.formats.packed import QuantizedSettings
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.models.source import ModelSource
from hqqtrain_kernels.layout import LAYOUT_VERSION

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two attempts to lock an entry that another run writes."""


@dataclass(frozen=True)
class CacheEntry:
    """A folder of packed weights.

    Attributes:
        folder: The folder.
        is_complete: Whether the folder can be read. Otherwise this run must write it.
    """

    folder: Path
    is_complete: bool


@contextmanager
def cache_entry(
    plan: ModelPlan,
    cache_dir: str,
    dtype: torch.dtype,
    comm: Communicator,
    preemption: PreemptionHandler,
) -> Iterator[CacheEntry]:
    """Find the cache entry for the weights of `plan`. Collective.

    An entry that does not exist yet is locked until the context ends, so that only this run writes
    it.

    Args:
        plan: The plan of a model whose source is dense.
        cache_dir: The folder of the cache, `quant.cache_dir`.
        dtype: The dtype in which dense tensors are read.
        comm: All ranks of the run.
        preemption: Knows whether a rank was asked to stop.

    Raises:
        UserError: The nodes do not share the folder, or it cannot be written to.
        PreemptedError: The run was asked to stop while it waited for another run.
    """
    name = _entry_name(plan.source, QuantizedSettings.from_model(plan.model), dtype)
    folder = Path(cache_dir).expanduser() / name
    lock_path = folder.with_name(f".{folder.name}.lock")
    with _hold_lock(lock_path, cache_dir, comm, preemption) as lock_file:
        # Rank 0 decides, and its token in the lock file proves that all ranks see the same folder.
        observed = (read_lock_token(lock_path), (folder / "config.json").is_file())
        token, is_complete = comm.all_gather_object(observed)[0]
        with comm.raise_on_all_ranks():
            check_shared_lock(lock_path, token, f"quant.cache_dir={cache_dir}")
        # A complete entry is only read, so release the lock: other runs may read it, too.
        if lock_file and is_complete:
            lock_file.close()
        if comm.is_main:
            state = "is there" if is_complete else "is made now"
            logger.info("quant.cache_dir: %s %s", folder, state)
        yield CacheEntry(folder, is_complete)


@contextmanager
def _hold_lock(
    lock_path: Path, cache_dir: str, comm: Communicator, preemption: PreemptionHandler
) -> Iterator[IO[str] | None]:
    """Hold the lock of an entry, which rank 0 locks for all ranks. Collective.

    All ranks wait together, so that a signal to any of them stops all.

    Yields:
        The locked file on rank 0, None on the others.
    """
    for attempt in itertools.count():
        with comm.raise_on_all_ranks():
            lock_file = _try_lock(lock_path, cache_dir) if comm.is_main else None
        if comm.all_gather_object(lock_file is not None)[0]:
            break
        if comm.is_main and attempt == 0:
            logger.info("quant.cache_dir: waiting for another run, which has %s", lock_path)
        preemption.check(comm)
        time.sleep(POLL_SECONDS)
    try:
        yield lock_file
    finally:
        if lock_file:
            lock_file.close()


def _try_lock(lock_path: Path, cache_dir: str) -> IO[str] | None:
    """Return the locked file; None if another run has locked it."""
    try:
        return try_lock(lock_path)
    except OSError as error:
        raise UserError(
            f"quant.cache_dir={cache_dir}: cannot be written to ({error}); choose another."
        ) from error


def _entry_name(source: ModelSource, settings: QuantizedSettings, dtype: torch.dtype) -> str:
    """Return the name of an entry: the name of the source and a hash of all inputs.

    Args:
        source: The dense source.
        settings: Quantization settings by module.
        dtype: The dtype in which dense tensors are read.
    """
    is_synthetic = source.kind == "synthetic"
    inputs = {
        "source": [source.kind, stat_digest(source.path), source.name if is_synthetic else ""],
        "dense": str(dtype),
        "modules": settings.by_module(),
        "layout": LAYOUT_VERSION,
        "version": __version__,
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    short_name = source.name.rstrip("/").rpartition("/")[2]
    return f"{short_name}-{digest[:24]}"
