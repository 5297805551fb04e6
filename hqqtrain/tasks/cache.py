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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from hqqtrain import __version__
from hqqtrain.ckpt import MADE_FROM, QuantizedSettings, made_from, stamp
from hqqtrain.ckpt.lock import check_seen, take_lock, token_of
from hqqtrain.config import UserError
from hqqtrain.models import Source
from hqqtrain.tasks.plan import Plan
from hqqtrain.tasks.prepare import Built
from hqqtrain.tasks.save import save_packed
from hqqtrain.train.session import Session
from hqqtrain_kernels.layout import LAYOUT_VERSION

logger = logging.getLogger(__name__)

ERRORS = "errors.json"
"""File of a folder of packed weights with the quantization errors, which need the dense weights."""
POLL = 1.0
"""Seconds between two attempts to lock an entry that another run makes."""


@dataclass(frozen=True)
class Entry:
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
def cached(plan: Plan, session: Session) -> Iterator[Entry | None]:
    """Find the cache entry for the weights of `plan`. Collective.

    An entry that does not exist yet is locked until the context ends, so that only this run makes
    it.

    Yields:
        The entry; None without `quant.cache_dir`, or if the source is packed already.

    Raises:
        UserError: The nodes do not share the folder, or it cannot be written to.
        PreemptedError: The run was asked to stop while it waited for another run.
    """
    cache_dir, processes = session.config.quant.cache_dir, session.processes
    if cache_dir is None or plan.packed:
        yield None
        return
    key = _key(plan.source, QuantizedSettings.of(plan.model), session.dtype)
    folder = Path(cache_dir).expanduser() / key
    lock = folder.with_name(f".{folder.name}.lock")
    with _locked(lock, cache_dir, session) as file:
        # The first rank decides, and its token in the lock file proves that all ranks see the
        # same folder.
        state = (token_of(lock), (folder / "config.json").is_file())
        token, is_made = processes.gather(state)[0]
        with processes.together():
            check_seen(lock, token, f"quant.cache_dir={cache_dir}")
        # A complete entry is only read, so runs may use it at the same time.
        if file and is_made:
            file.close()
        if processes.is_main:
            logger.info("quant.cache_dir: %s %s", folder, "is there" if is_made else "is made now")
        yield Entry(folder, is_made)


def save_entry(entry: Entry, plan: Plan, built: Built, session: Session) -> None:
    """Write the packed weights of `built` and their quantization errors to `entry`. Collective."""
    errors = {"layers": built.layer_errors, "all": built.relative_error}
    beside = {ERRORS: errors, MADE_FROM: made_from(session.config)}
    save_packed(plan, built, session, entry.folder, beside=beside)


@contextmanager
def _locked(lock: Path, cache_dir: str, session: Session) -> Iterator[IO[str] | None]:
    """Hold the lock file, which the first rank locks. Collective.

    All ranks wait together, so that a signal to any of them stops all.

    Yields:
        The locked file on the first rank, None on the others.
    """
    processes = session.processes
    for attempt in itertools.count():
        with processes.together():
            file = _try_lock(lock, cache_dir) if processes.is_main else None
        if processes.gather(file is not None)[0]:
            break
        if processes.is_main and attempt == 0:
            logger.info("quant.cache_dir: waiting for another run, which has %s", lock)
        session.interrupt.check(processes)
        time.sleep(POLL)
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


def _key(source: Source, settings: QuantizedSettings, dtype: torch.dtype) -> str:
    """Return the name of an entry: the name of the source and a hash of all inputs.

    Args:
        source: The dense source.
        settings: Quantization settings by module.
        dtype: The dtype in which dense tensors are read.
    """
    synthetic = source.kind == "synthetic"
    facts = {
        "source": [source.kind, stamp(source.path), source.name if synthetic else ""],
        "dense": str(dtype),
        "modules": settings.by_module(),
        "layout": LAYOUT_VERSION,
        "version": __version__,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{source.name.rstrip('/').rpartition('/')[2]}-{digest[:24]}"
