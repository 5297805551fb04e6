"""Cache of quantized weights, shared by runs with the same source and the same quantization.

Without it, a sweep over adapters or jobs on many nodes would quantize the same model again and
again. An entry is a folder like `quantized/`, named by a hash of its inputs; it is complete or
absent. A run that needs an entry while another run makes it waits.
"""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch

from hqqtrain import __version__
from hqqtrain.common.errors import UserError
from hqqtrain.common.filelock import check_shared_lock, lock_token, take_lock
from hqqtrain.distributed.local import full_tensor
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.formats.packed import (
    QuantizedSettings,
    in_source_dtype,
    model_tensors,
    save_quantized,
)
from hqqtrain.loading.build import LoadedModel
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.models.source import ModelSource
from hqqtrain.rundir.provenance import MADE_FROM, source_digest, stat_digest
from hqqtrain_kernels.layout import LAYOUT_VERSION

logger = logging.getLogger(__name__)

ERRORS = "errors.json"
"""File of a folder of packed weights with the quantization errors, which need the dense weights."""

POLL_SECONDS = 1.0
"""Seconds between two attempts to lock an entry that another run makes."""


@dataclass(frozen=True)
class CacheEntry:
    """A folder of packed weights, complete (`is_made`) or to be written by this run."""

    folder: Path
    is_made: bool

    def errors(self) -> tuple[dict[str, float], float | None]:
        """Return the relative errors (by layer, over all layers) measured when it was made.

        Return ({}, None) if the folder does not record them.
        """
        file = self.folder / ERRORS
        if not file.is_file():
            return {}, None
        errors = json.loads(file.read_text(encoding="utf-8"))
        return errors["layers"], errors["all"]


@contextmanager
def cache_entry(plan: ModelPlan, runtime: Runtime) -> Iterator[CacheEntry | None]:
    """Find the cache entry for the weights of `plan`. Collective.

    An entry that does not exist yet is locked until the context ends, so that only this run makes
    it.

    Yields:
        The entry; None without `quant.cache_dir`, or if the source is packed already.

    Raises:
        UserError: The nodes do not share the folder, or it cannot be written to.
        PreemptedError: The run was asked to stop while it waited for another run.
    """
    cache_dir, comm = runtime.config.quant.cache_dir, runtime.comm
    if cache_dir is None or plan.packed:
        yield None
        return
    key = _key(plan.source, QuantizedSettings.of(plan.model), runtime.dtype)
    folder = Path(cache_dir).expanduser() / key
    lock = folder.with_name(f".{folder.name}.lock")
    with _locked(lock, cache_dir, runtime) as file:
        # The first rank decides, and its token in the lock file proves that all ranks see the
        # same folder.
        state = (lock_token(lock), (folder / "config.json").is_file())
        token, is_made = comm.gather(state)[0]
        with comm.raise_on_all_ranks():
            check_shared_lock(lock, token, f"quant.cache_dir={cache_dir}")
        # A complete entry is only read, so runs may use it at the same time.
        if file and is_made:
            file.close()
        if comm.is_main:
            logger.info("quant.cache_dir: %s %s", folder, "is there" if is_made else "is made now")
        yield CacheEntry(folder, is_made)


def save_cache_entry(
    entry: CacheEntry, plan: ModelPlan, loaded: LoadedModel, runtime: Runtime
) -> None:
    """Write the packed weights of `loaded` and their quantization errors to `entry`. Collective."""
    errors = {"layers": loaded.layer_errors, "all": loaded.relative_error}
    beside = {ERRORS: errors, MADE_FROM: source_digest(runtime.config)}
    save_packed(plan, loaded, runtime, entry.folder, beside=beside)


@contextmanager
def _locked(lock: Path, cache_dir: str, runtime: Runtime) -> Iterator[IO[str] | None]:
    """Hold the lock file, which the first rank locks. Collective.

    All ranks wait together, so that a signal to any of them stops all.

    Yields:
        The locked file on the first rank, None on the others.
    """
    comm = runtime.comm
    for attempt in itertools.count():
        with comm.raise_on_all_ranks():
            file = _try_lock(lock, cache_dir) if comm.is_main else None
        if comm.gather(file is not None)[0]:
            break
        if comm.is_main and attempt == 0:
            logger.info("quant.cache_dir: waiting for another run, which has %s", lock)
        runtime.preemption.check(comm)
        time.sleep(POLL_SECONDS)
    try:
        yield file
    finally:
        if file:
            file.close()


def _try_lock(lock: Path, cache_dir: str) -> IO[str] | None:
    try:
        return take_lock(lock)
    except OSError as error:
        raise UserError(
            f"quant.cache_dir={cache_dir}: cannot be written to ({error}); choose another."
        ) from error


def _key(source: ModelSource, settings: QuantizedSettings, dtype: torch.dtype) -> str:
    """Return the name of an entry: the name of the source and a hash of all inputs.

    Args:
        source: The dense source.
        settings: Quantization settings by module.
        dtype: The dtype in which dense tensors are read.
    """
    synthetic = source.kind == "synthetic"
    facts = {
        "source": [source.kind, stat_digest(source.path), source.name if synthetic else ""],
        "dense": str(dtype),
        "modules": settings.by_module(),
        "layout": LAYOUT_VERSION,
        "version": __version__,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{source.name.rstrip('/').rpartition('/')[2]}-{digest[:24]}"


def save_packed(
    plan: ModelPlan,
    loaded: LoadedModel,
    runtime: Runtime,
    folder: Path,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the packed weights to `folder`; every rank writes a part of the files. Collective.

    Args:
        plan: The plan of the model.
        built: The loaded model.
        session: Processes of the run.
        folder: A folder like `quantized/`, which appears complete or not at all.
        beside: Further JSON files, name to content.
    """
    tensors = in_source_dtype(model_tensors(loaded.model, gather=full_tensor), plan.source_dtype)
    save_quantized(
        tensors,
        folder,
        hf_config=plan.hf_config,
        settings=loaded.settings,
        source=plan.source.tokenizer,
        comm=runtime.comm,
        beside=beside,
    )
