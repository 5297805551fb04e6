"""Quantized weights that runs share: made once for a source and its settings, by the first to come.

A sweep over adapters, or jobs on many nodes, would else quantize the same model again and again. An
entry is a folder like `quantized/`, named by what it was made from, complete or absent; who comes
while it is being made waits.
"""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
POLL = 1.0
"""Seconds between two looks at an entry that another run makes."""


@dataclass(frozen=True)
class Entry:
    """`folder` holds the weights, or is to hold them when this run has made them."""

    folder: Path
    is_made: bool

    def errors(self) -> tuple[dict[str, float], float | None]:
        """Relative errors by layer and of all, as they were measured when it was made, if so."""
        file = self.folder / ERRORS
        if not file.is_file():
            return {}, None
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["layers"], found["all"]


@contextmanager
def cached(plan: Plan, session: Session) -> Iterator[Entry | None]:
    """The cache's entry for what `plan` quantizes; None without `quant.cache_dir`. Collective.

    Within, no other run touches an entry that is not made yet.

    Raises UserError where the nodes do not share the folder, or it cannot be written to.
    """
    cache_dir = session.config.quant.cache_dir
    if cache_dir is None or plan.packed:
        yield None
        return
    key = _key(plan.source, QuantizedSettings.of(plan.model), session.dtype)
    with _entry(cache_dir, key, session) as entry:
        yield entry


def save_entry(entry: Entry, plan: Plan, built: Built, session: Session) -> None:
    """Writes what `plan` has become to `entry`, with the errors beside it. Collective."""
    errors = {"layers": built.layer_errors, "all": built.relative_error}
    beside = {ERRORS: errors, MADE_FROM: made_from(session.config)}
    save_packed(plan, built, session, entry.folder, beside=beside)


@contextmanager
def _entry(cache_dir: str, key: str, session: Session) -> Iterator[Entry]:
    processes = session.processes
    folder = Path(cache_dir).expanduser() / key
    lock = folder.with_name(f".{folder.name}.lock")
    with ExitStack() as stack:
        held = stack.enter_context(_locked(lock, cache_dir, session))
        token, is_made = processes.gather((token_of(lock), (folder / "config.json").is_file()))[0]
        with processes.together():
            check_seen(lock, token, f"quant.cache_dir={cache_dir}")
        if held and is_made:
            held.close()
        if processes.is_main:
            logger.info("quant.cache_dir: %s %s", folder, "is there" if is_made else "is made now")
        yield Entry(folder, is_made)


@contextmanager
def _locked(lock: Path, cache_dir: str, session: Session) -> Iterator[IO[str] | None]:
    """The first rank's; None on others. All wait, and hear from each other while they do."""
    processes = session.processes
    for attempt in itertools.count():
        with processes.together():
            file = _try(lock, cache_dir) if processes.is_main else None
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


def _try(lock: Path, cache_dir: str) -> IO[str] | None:
    try:
        return take_lock(lock)
    except OSError as error:
        raise UserError(
            f"quant.cache_dir={cache_dir}: cannot be written to ({error}); choose another."
        ) from error


def _key(source: Source, settings: QuantizedSettings, dtype: torch.dtype) -> str:
    """By the architecture's name for a person, and a hash of all that gives the weights.

    `dtype`: what tensors in full precision were rounded to on the way.
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
