"""Identify files by their contents, without reading a large file at every start.

Sizes and modification times do not identify a file: a tool may keep both while it changes the
content. So a digest covers every byte. The digest of a large file is kept in the user's cache
together with what `stat` says of the file, and is taken again as soon as one of these numbers
differs. One of them is the time of the last change of the inode (ctime), which no program can set.
See `docs/adr/0013-content-decides.md`.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write
from hqqtrain.common.reading import load_json

BLOCK_BYTES = 1 << 26
"""Bytes that one thread hashes at a time. A digest is the hash of the hashes of all blocks, so that
threads and ranks share the work even if there is a single file."""

_READ_BYTES = 1 << 20

_REMEMBERED_BYTES = 1 << 24
"""A smaller file is read at every start, which takes at most some milliseconds."""

_SETTLED_NANOSECONDS = 2_000_000_000
"""A digest is trusted later only if the file was last changed this long before it was read.

Otherwise the file may have been changed once more within the same tick of the file system's clock.
"""


class Block(NamedTuple):
    """A part of a file: `BLOCK_BYTES` bytes from `offset`, or fewer at the end of the file."""

    name: str
    offset: int


class ContentDigest:
    """The digest of the names and contents of some files, most of which may be known already.

    A caller with several ranks lets each of them hash some of `blocks`. `content_digest` is for one
    process.

    Args:
        folder: The folder that the names are relative to.
        names: The names of the files.

    Raises:
        UserError: A file cannot be read.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self._stats = {name: _file_stat(folder / name) for name in sorted(names)}
        self._memo = _Memo(folder)
        self._hashed_at = time.time_ns()
        self._known = {
            name: digest
            for name, stats in self._stats.items()
            if (digest := self._memo.digest(name, stats))
        }
        self.blocks = [
            Block(name, offset)
            for name, stats in self._stats.items()
            if name not in self._known
            for offset in range(0, max(stats[0], 1), BLOCK_BYTES)
        ]

    def finish(self, hashes: Sequence[bytes]) -> str:
        """Return `sha256:...` of all files, and remember the digests of large files.

        Args:
            hashes: The results of `hash_blocks` for `self.blocks`, in this order.
        """
        by_name: dict[str, Any] = {}
        for block, digest in zip(self.blocks, hashes, strict=True):
            by_name.setdefault(block.name, hashlib.sha256()).update(digest)
        new = {name: sha256.hexdigest() for name, sha256 in by_name.items()}
        # A file that has changed while it was read gets a digest that is not remembered.
        unchanged = {n: d for n, d in new.items() if _file_stat(self.folder / n) == self._stats[n]}
        self._memo.remember(unchanged, self._stats, self._hashed_at)
        digests = self._known | new
        listed = json.dumps([[name, digests[name]] for name in self._stats])
        return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"


def content_digest(folder: Path, names: Sequence[str]) -> str:
    """Return `sha256:...` of the names and contents of files, with the threads of this process.

    Raises:
        UserError: A file cannot be read.
    """
    digest = ContentDigest(folder, names)
    return digest.finish(hash_blocks(folder, digest.blocks))


def hash_blocks(
    folder: Path, blocks: Sequence[Block], on_block: Callable[[], object] = lambda: None
) -> list[bytes]:
    """Return the sha256 of each block, with one thread per core of this process, up to 8.

    Args:
        folder: The folder that contains the files.
        blocks: The blocks.
        on_block: Called in the calling thread after each block.

    Raises:
        UserError: A file cannot be read.
    """
    hashes = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "hashing") as pool:
        futures = [pool.submit(_hash_block, folder / block.name, block.offset) for block in blocks]
        try:
            for future in futures:
                hashes.append(future.result())
                on_block()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return hashes


def _hash_block(path: Path, offset: int) -> bytes:
    digest, left = hashlib.sha256(), BLOCK_BYTES
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while left and (data := file.read(min(left, _READ_BYTES))):
                digest.update(data)
                left -= len(data)
    except OSError as error:
        raise _unreadable_error(path, error) from error
    return digest.digest()


def _file_stat(path: Path) -> list[int]:
    """Return size, mtime, ctime (both in ns) and inode of a regular file."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable_error(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: is not a regular file, so its content cannot be identified.")
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _unreadable_error(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}).")


class _Memo:
    """Digests of the large files of a folder, in a file of the user's cache.

    It contains name -> [stat, time of reading in ns, digest]. A memo that cannot be read or written
    costs time and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
        self._file = cache_folder() / "digests" / f"{key}.json"
        try:
            # Somebody else could choose the digests, and so exchange a file unseen.
            is_own = self._file.lstat().st_uid in (os.getuid(), 0)
            content = load_json(self._file) if is_own and not self._file.is_symlink() else None
        except (OSError, ValueError):
            content = None
        self._entries: dict[str, Any] = content if isinstance(content, dict) else {}

    def digest(self, name: str, stats: list[int]) -> str | None:
        """Return the digest of a file; None if it is unknown or in doubt."""
        match self._entries.get(name):
            case [saved, int(hashed_at), str(digest)] if saved == stats:
                return digest if hashed_at - stats[2] > _SETTLED_NANOSECONDS else None
        return None

    def remember(
        self, digests: Mapping[str, str], stats: Mapping[str, list[int]], hashed_at: int
    ) -> None:
        """Keep the digests of the files that are large."""
        large = {n: d for n, d in digests.items() if stats[n][0] >= _REMEMBERED_BYTES}
        if not large:
            return
        self._entries |= {name: [stats[name], hashed_at, d] for name, d in large.items()}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            atomic_write(self._file, json.dumps(self._entries))
        except OSError:
            return


def cache_folder() -> Path:
    """Return the folder for what this user's later runs can use: `$HQQTRAIN_CACHE` if it is set."""
    if own := os.environ.get("HQQTRAIN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache")).expanduser() / "hqqtrain"
