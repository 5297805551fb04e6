"""Tokenized data in a folder that runs share, which one process writes and all ranks map.

An entry is named by a hash of everything that decides its tokens, so a changed file or setting gets
another one. Rank 0 finds or writes it, while the others wait without a collective, which would time
out. Machines that do not share the folder write an entry of their own afterwards.
"""

import hashlib
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hqqtrain.common.cache_entry import default_cache_root, is_complete_entry, lock_entry, lock_path
from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.common.filelock import becomes_true
from hqqtrain.common.files import atomic_directory, check_owner
from hqqtrain.common.kept_log import kept_log
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.common.text import format_bytes
from hqqtrain.config.data_sources import describe_source
from hqqtrain.data.mixture import SourceUse
from hqqtrain.data.packing import EXAMPLES, PACKED, TokenizedData
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.token_files import (
    INDEX,
    DamagedStoreError,
    describe_store,
    map_sequences,
    save_sequences,
)
from hqqtrain.distributed.comm import FULL_DISK
from hqqtrain.distributed.heartbeat import Heartbeat
from hqqtrain.tasks.context import Run

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Seconds between two attempts to lock an entry that another run writes."""


Build = Callable[[Path, Callable[[], object]], TokenizedData]
"""Writes the tokens into a folder. It calls its second argument now and then, which may raise."""


@dataclass(frozen=True)
class CachedTokens:
    """The mapped sequences of an entry, which are checked when they are mapped."""

    folder: Path

    def __post_init__(self) -> None:
        _ = self.sequences

    @cached_property
    def sequences(self) -> TokenSequences:
        """The sequences to train on, or the windows to evaluate on."""
        names = describe_store(self.folder)["sequences"]
        return map_sequences(self.folder, PACKED) if PACKED in names else self.parts

    @cached_property
    def parts(self) -> TokenSequences:
        """All tokens of the examples, and as sequences the parts that are trained on."""
        return map_sequences(self.folder, EXAMPLES)

    @property
    def uses(self) -> list[SourceUse]:
        """How an epoch uses each source, in the order of the examples; empty for one source."""
        uses = []
        for use in describe_store(self.folder).get("uses", []):
            match use:
                case {
                    "source": str(source),
                    "examples": int(examples),
                    "repeats": float(repeats),
                    "used": int(used),
                }:
                    uses.append(SourceUse(source, examples, repeats, used))
        return uses

    def describe(self) -> str:
        """Return the number of tokens and the size of the entry, as `1,234 tokens (0.25 GiB)`."""
        tokens = describe_store(self.folder)["sequences"][EXAMPLES]["tokens"]
        size = sum(file.stat().st_size for file in self.folder.iterdir())
        return f"{tokens:,} tokens ({format_bytes(size)})"

    def repeat_log(self) -> None:
        """Log what was logged when the entry was written."""
        for line in describe_store(self.folder).get("log", []):
            match line:
                case [int(level), str(message)]:
                    logger.log(level, "%s", message)


def cached_tokens(
    run: Run, kind: str, identity: Callable[[], Mapping[str, Any]], build: Build
) -> CachedTokens:
    """Find the entry for some data, or write it. Collective.

    Args:
        run: The run.
        kind: `train` or `eval`, the first part of the name.
        identity: Returns everything that decides the tokens, as JSON. It is called on ranks that
            write, and on rank 0.
        build: Writes the tokens. It is called on one rank of each machine at most.

    Raises:
        UserError: `identity` or `build` has raised it, or the folder cannot be written to or
            trusted.
        PreemptedError: A rank was asked to stop.
    """
    comm, check_signal = run.runtime.comm, run.runtime.preemption.check_local
    cached, name, made_from = None, "", dict[str, Any]()
    cache = _Cache(run, identity, build)
    with Heartbeat(comm) as heartbeat:
        if comm.is_main:
            made_from = dict(identity())
            digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
            name = f"{kind}-{digest[:24]}"
            cached = cache.find_or_write(name, made_from, heartbeat)
        else:
            heartbeat.wait_for(0, check_signal)
    name, made_from = comm.all_gather_object((name, made_from))[0]
    sees = cached is not None or becomes_true((cache.root / name / INDEX).is_file)
    hosts = comm.all_gather_object("" if sees else socket.gethostname())
    # The first rank of each machine that does not see the entry.
    writers = {host: rank for rank, host in reversed(list(enumerate(hosts))) if host}
    if writers:
        with Heartbeat(comm) as heartbeat:
            if comm.rank in writers.values():
                cached = cache.find_or_write(name, made_from, heartbeat)
            else:
                for writer in writers.values():
                    heartbeat.wait_for(writer, check_signal)
    with comm.raise_on_all_ranks():
        return cached or cache.open(name)


class _Cache:
    """The entries in `data.cache_dir`."""

    def __init__(self, run: Run, identity: Callable[[], Mapping[str, Any]], build: Build) -> None:
        config = run.config
        self._run, self._identity, self._build = run, identity, build
        self._where = "data.cache_dir=null"
        if config.data.cache_dir is not None:
            self.root = Path(config.data.cache_dir).expanduser()
            self._where = f"data.cache_dir={config.data.cache_dir}"
        else:
            self.root = default_cache_root("tokens", Path(config.run.root))

    def open(self, name: str) -> CachedTokens:
        """Map an entry that another rank has found or written.

        Raises:
            UserError: It is damaged.
        """
        try:
            return CachedTokens(self.root / name)
        except DamagedStoreError as error:
            raise UserError(f"{self._where}: {error}. Remove the folder.") from error

    def find_or_write(
        self, name: str, made_from: Mapping[str, Any], heartbeat: Heartbeat
    ) -> CachedTokens:
        """Return an entry, which is written if it is absent or damaged."""

        def check() -> None:
            self._run.runtime.preemption.check_local()
            heartbeat.check()

        folder, lock = self.root / name, lock_path(self.root / name)
        check_owner(self.root, self._where)
        if cached := self._find(folder):
            return cached
        waits = False
        while (locked := lock_entry(lock, self._where)) is None:
            if not waits:
                logger.info("%s: waiting for another run, which has %s", self._where, lock)
            waits = True
            check()
            if reason := self._run.runtime.preemption.stop_reason:  # also a time limit
                raise PreemptedError(reason)
            time.sleep(POLL_SECONDS)
        with locked:
            if cached := self._find(folder):  # another run has written it meanwhile
                return cached
            try:
                with atomic_directory(folder) as temporary, kept_log() as log:
                    data = self._build_unchanged(temporary, made_from, check)
                    by_name = {EXAMPLES: data.parts}
                    if data.sequences.stream is not data.parts.stream:
                        by_name[PACKED] = data.sequences
                    uses = [asdict(use) for use in data.uses]
                    said = mask_secrets({"made_from": made_from, "uses": uses, "log": log})
                    save_sequences(temporary, by_name, **said)
            except OSError as error:
                if error.errno in FULL_DISK and not error.filename:
                    raise OSError(error.errno, error.strerror, str(self.root)) from error
                raise
        cached = self.open(name)
        logger.info("data.cache_dir: %s are written to %s", cached.describe(), folder)
        return cached

    def _build_unchanged(
        self, folder: Path, made_from: Mapping[str, Any], check: Callable[[], object]
    ) -> TokenizedData:
        """Write the tokens of the contents in `made_from`, from which the entry has its name.

        Raises:
            UserError: This machine has other contents, or they have changed meanwhile.
        """
        where = f"data.source={describe_source(self._run.config.data.source)}"

        def is_same() -> bool:
            return bool(self._identity().get("contents") == made_from.get("contents"))

        if not (self._run.runtime.comm.is_main or is_same()):
            raise UserError(
                f"{where}: the text is not the same on all machines; use the same files and the "
                "same Python version, also for eval.source."
            )
        data = self._build(folder, check)
        if not is_same():
            raise UserError(
                f"{where}: its files, or those of eval.source, have changed while their tokens "
                "were made. Start the command again."
            )
        return data

    def _find(self, folder: Path) -> CachedTokens | None:
        """Return the entry in `folder`; None if it is absent or damaged."""
        if not is_complete_entry(folder, INDEX, self._where.partition("=")[0]):
            return None
        try:
            cached = CachedTokens(folder)
            _ = cached.parts  # which only this rank checks
        except DamagedStoreError as error:
            logger.warning("%s: %s. The tokens are written again.", self._where, error)
            return None
        cached.repeat_log()
        logger.info("data.cache_dir: %s are reused from %s", cached.describe(), folder)
        return cached
