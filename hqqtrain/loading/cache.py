"""Cache of quantized weights, shared by runs with the same source and the same quantization.

Without it, a sweep over adapters or jobs on many nodes would quantize the same model again and
again. An entry is a folder like `quantized/`, named by a hash of its inputs; it is complete or
absent. A run that needs an entry while another run writes it waits for the other run. Entries of
other caches that all ranks write together are found and locked in the same way.
"""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from hqqtrain import __version__
from hqqtrain.common.cache_entry import is_complete_entry, lock_entry, lock_path
from hqqtrain.common.filelock import check_shared_file, check_shared_lock, read_lock_token
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.formats.manifest import MANIFEST, file_digest
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.models.source import ModelSource
from hqqtrain_kernels.layout import LAYOUT_VERSION

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two attempts to lock an entry that another run writes."""


@dataclass(frozen=True)
class CacheEntry:
    """A folder of a cache.

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
    source_digest: str,
) -> Iterator[CacheEntry]:
    """Find the cache entry for the weights of `plan`. Collective.

    A complete entry is only read, so this user need not be allowed to write to it or to lock it. An
    entry that does not exist yet is locked until the context ends, so that only this run writes it.

    Args:
        plan: The plan of a model whose source is dense.
        cache_dir: The folder of the cache, `quant.cache_dir`.
        dtype: The dtype in which dense tensors are read.
        comm: All ranks of the run.
        preemption: Knows whether a rank was asked to stop.
        source_digest: The digest of the plan's source, see `digest_source`.

    Raises:
        UserError: The nodes do not share the folder, it cannot be written to, or the entry may be
            that of a stranger.
        PreemptedError: The run was asked to stop while it waited for another run.
    """
    settings = QuantizedSettings.from_model(plan.model)
    folder = Path(cache_dir).expanduser() / _entry_name(plan.source, settings, dtype, source_digest)
    where = f"quant.cache_dir={cache_dir}"

    def is_complete() -> bool:
        return is_complete_entry(folder, "config.json", "quant.cache_dir")

    with shared_entry(folder, is_complete, where, comm, preemption) as entry:
        yield entry


@contextmanager
def shared_entry(
    folder: Path,
    is_complete: Callable[[], bool],
    where: str,
    comm: Communicator,
    preemption: PreemptionHandler,
) -> Iterator[CacheEntry]:
    """Find an entry that all ranks read or write together. Collective.

    Args:
        folder: The folder of the entry.
        is_complete: Returns whether the folder can be read; called on rank 0.
        where: The config key of the cache and its value, for messages.
        comm: All ranks of the run.
        preemption: Knows whether a rank was asked to stop.

    Raises:
        UserError: As in `cache_entry`.
        PreemptedError: As in `cache_entry`.
    """
    key = where.partition("=")[0]
    if comm.run_on_rank0(is_complete):
        _check_shared_entry(folder, where, comm)
        yield CacheEntry(folder, True)
        return
    lock = lock_path(folder)
    with _hold_lock(lock, where, comm, preemption) as lock_file:
        # Rank 0 decides, and its token in the lock file proves that all ranks see the same folder.
        with comm.raise_on_all_ranks():
            observed = (read_lock_token(lock), comm.is_main and is_complete())
        token, is_there = comm.all_gather_object(observed)[0]
        with comm.raise_on_all_ranks():
            check_shared_lock(lock, token, where)
        # A complete entry is only read, so release the lock: other runs may read it, too.
        if lock_file and is_there:
            lock_file.close()
        if comm.is_main and not is_there:
            logger.info("%s: %s is made now", key, folder)
        if is_there:
            _check_shared_entry(folder, where, comm)
        yield CacheEntry(folder, is_there)


def _check_shared_entry(folder: Path, where: str, comm: Communicator) -> None:
    """Check that all ranks see the entry that rank 0 has found; rank 0 logs it. Collective."""
    manifest = folder / MANIFEST if (folder / MANIFEST).is_file() else folder / "config.json"
    manifest, digest = comm.run_on_rank0(lambda: (manifest, file_digest(manifest)["sha256"]))
    with comm.raise_on_all_ranks():
        check_shared_file(manifest, digest, where)
    if comm.is_main:
        logger.info("%s: %s is there", where.partition("=")[0], folder)


@contextmanager
def _hold_lock(
    lock: Path, where: str, comm: Communicator, preemption: PreemptionHandler
) -> Iterator[IO[str] | None]:
    """Hold the lock of an entry, which rank 0 locks for all ranks. Collective.

    All ranks wait together, so that a signal to any of them stops all.

    Yields:
        The locked file on rank 0, None on the others.
    """
    for attempt in itertools.count():
        with comm.raise_on_all_ranks():
            lock_file = lock_entry(lock, where) if comm.is_main else None
        if comm.all_gather_object(lock_file is not None)[0]:
            break
        if comm.is_main and attempt == 0:
            key = where.partition("=")[0]
            logger.info("%s: waiting for another run, which has %s", key, lock)
        preemption.check(comm)
        time.sleep(POLL_SECONDS)
    try:
        yield lock_file
    finally:
        if lock_file:
            lock_file.close()


def _entry_name(
    source: ModelSource, settings: QuantizedSettings, dtype: torch.dtype, source_digest: str
) -> str:
    """Return the name of an entry: the name of the source and a hash of all inputs.

    Args:
        source: The dense source.
        settings: Quantization settings by module.
        dtype: The dtype in which dense tensors are read.
        source_digest: The digest of the source's files.
    """
    is_synthetic = source.kind == "synthetic"
    inputs = {
        "source": [source.kind, source_digest, source.name if is_synthetic else ""],
        "dense": str(dtype),
        "modules": settings.by_module(),
        "layout": LAYOUT_VERSION,
        "version": __version__,
    }
    if source.trained_token_ids:  # the packed weights have rows for them
        inputs["tokens"] = max(source.trained_token_ids)
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    short_name = source.name.rstrip("/").rpartition("/")[2]
    return f"{short_name}-{digest[:24]}"
