"""Quantized weights that runs share: made once for a source and its settings, by the first to come.

A sweep over adapters, or jobs on many nodes, would else quantize the same model again and again. An
entry is a folder like `quantized/`, named by what it was made from, complete or absent; who comes
while it is being made waits.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hqqtrain import __version__
from hqqtrain.ckpt import QuantizedSettings, stamp
from hqqtrain.ckpt.lock import check_seen, take_lock, token_of
from hqqtrain.config import UserError
from hqqtrain.dist import Processes
from hqqtrain.models import Source
from hqqtrain.train.prepare import Built, Plan
from hqqtrain.train.save import save_packed
from hqqtrain.train.session import Session
from hqqtrain_kernels.layout import LAYOUT_VERSION

logger = logging.getLogger(__name__)

ERRORS = "errors.json"


@dataclass(frozen=True)
class Entry:
    """`folder` holds the weights, or is to hold them when this run has made them."""

    folder: Path
    is_made: bool

    def errors(self) -> tuple[dict[str, float], float]:
        """Relative errors by layer and of all, as they were measured when it was made."""
        found = json.loads((self.folder / ERRORS).read_text(encoding="utf-8"))
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
    key = _key(plan.source, QuantizedSettings.of(plan.model))
    with _entry(cache_dir, key, session.processes) as entry:
        yield entry


def save_entry(entry: Entry, plan: Plan, built: Built, session: Session) -> None:
    """Puts what `plan` has become into the cache. Collective."""
    errors = {"layers": built.layer_errors, "all": built.relative_error}
    save_packed(plan, built, session, entry.folder, beside={ERRORS: errors})


@contextmanager
def _entry(cache_dir: str, key: str, processes: Processes) -> Iterator[Entry]:
    folder = Path(cache_dir).expanduser() / key
    lock = folder.with_name(f".{folder.name}.lock")
    with ExitStack() as stack:
        with processes.together():
            held = stack.enter_context(_locked(lock, cache_dir)) if processes.is_main else None
        token, is_made = processes.gather((token_of(lock), (folder / "config.json").is_file()))[0]
        with processes.together():
            check_seen(lock, token, f"quant.cache_dir={cache_dir}")
        if held and is_made:
            held.close()
        if processes.is_main:
            logger.info("quant.cache_dir: %s %s", folder, "is there" if is_made else "is made now")
        yield Entry(folder, is_made)


@contextmanager
def _locked(lock: Path, cache_dir: str) -> Iterator[IO[str]]:
    try:
        file = take_lock(lock)
        if file is None:
            logger.info("quant.cache_dir: waiting for another run, which has %s", lock)
            file = take_lock(lock, wait=True)
    except OSError as error:
        raise UserError(
            f"quant.cache_dir={cache_dir}: cannot be written to ({error}); choose another."
        ) from error
    assert file is not None
    with file:
        yield file


def _key(source: Source, settings: QuantizedSettings) -> str:
    """By the architecture's name for a person, and a hash of all that gives the weights."""
    synthetic = source.kind == "synthetic"
    facts = {
        "source": [source.kind, stamp(source.path), source.name if synthetic else ""],
        "modules": settings.by_module(),
        "layout": LAYOUT_VERSION,
        "version": __version__,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{source.name.rstrip('/').rpartition('/')[2]}-{digest[:24]}"
