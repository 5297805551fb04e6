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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from hqqtrain.formats.packed import QuantizedSettings, model_tensors, save_quantized
from hqqtrain.loading.build import LoadedModel
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.models.source import ModelSource
from hqqtrain.rundir.provenance import MADE_FROM, source_digest, stat_digest
from hqqtrain.tasks.save import Tensors
from hqqtrain_kernels.layout import LAYOUT_VERSION

logger = logging.getLogger(__name__)

ERRORS = "errors.json"

POLL_SECONDS = 1.0
"""Seconds between two looks at an entry that another run makes."""


@dataclass(frozen=True)
class CacheEntry:
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
def cache_entry(plan: ModelPlan, runtime: Runtime) -> Iterator[CacheEntry | None]:
    """The cache's entry for what `plan` quantizes; None without `quant.cache_dir`. Collective.

    Within, no other run touches an entry that is not made yet.

    Raises UserError where the nodes do not share the folder, or it cannot be written to.
    """
    cache_dir = runtime.config.quant.cache_dir
    if cache_dir is None or plan.packed:
        yield None
        return
    key = _key(plan.source, QuantizedSettings.of(plan.model), runtime.dtype)
    with _entry(cache_dir, key, runtime) as entry:
        yield entry


def save_cache_entry(
    entry: CacheEntry, plan: ModelPlan, loaded: LoadedModel, runtime: Runtime
) -> None:
    """Writes what `plan` has become to `entry`, with the errors beside it. Collective."""
    errors = {"layers": loaded.layer_errors, "all": loaded.relative_error}
    beside = {ERRORS: errors, MADE_FROM: source_digest(runtime.config)}
    save_packed(plan, loaded, runtime, entry.folder, beside=beside)


@contextmanager
def _entry(cache_dir: str, key: str, runtime: Runtime) -> Iterator[CacheEntry]:
    comm = runtime.comm
    folder = Path(cache_dir).expanduser() / key
    lock = folder.with_name(f".{folder.name}.lock")
    with ExitStack() as stack:
        held = stack.enter_context(_locked(lock, cache_dir, runtime))
        token, is_made = comm.gather((lock_token(lock), (folder / "config.json").is_file()))[0]
        with comm.raise_on_all_ranks():
            check_shared_lock(lock, token, f"quant.cache_dir={cache_dir}")
        if held and is_made:
            held.close()
        if comm.is_main:
            logger.info("quant.cache_dir: %s %s", folder, "is there" if is_made else "is made now")
        yield CacheEntry(folder, is_made)


@contextmanager
def _locked(lock: Path, cache_dir: str, runtime: Runtime) -> Iterator[IO[str] | None]:
    """The first rank's; None on others. All wait, and hear from each other while they do."""
    comm = runtime.comm
    for attempt in itertools.count():
        with comm.raise_on_all_ranks():
            file = _try(lock, cache_dir) if comm.is_main else None
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


def _try(lock: Path, cache_dir: str) -> IO[str] | None:
    try:
        return take_lock(lock)
    except OSError as error:
        raise UserError(
            f"quant.cache_dir={cache_dir}: cannot be written to ({error}); choose another."
        ) from error


def _key(source: ModelSource, settings: QuantizedSettings, dtype: torch.dtype) -> str:
    """By the architecture's name for a person, and a hash of all that gives the weights.

    `dtype`: what tensors in full precision were rounded to on the way.
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
    plan: ModelPlan, loaded: LoadedModel, runtime: Runtime, folder: Path,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Writes `quantized/`, every rank its part, and `beside` it JSON files. Collective."""
    tensors = _as_read(model_tensors(loaded.model, gather=full_tensor), plan)
    save_quantized(
        tensors, folder, hf_config=plan.hf_config, settings=loaded.settings,
        source=plan.source.tokenizer, comm=runtime.comm, beside=beside,
    )  # fmt: skip


def _as_read(tensors: Tensors, plan: ModelPlan) -> Tensors:
    """Tensors in full precision in the dtype they were read in, whatever was computed in."""
    for name, tensor in tensors:
        same = tensor.is_floating_point() and name in plan.reader
        yield name, tensor.to(plan.reader.dtype(name)) if same else tensor
