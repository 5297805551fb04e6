"""Folders that are made of a foreign checkpoint once, in the user's cache, complete or absent."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hqqtrain.common.cache_entry import is_complete_entry, lock_entry, lock_path
from hqqtrain.common.digest import cache_folder, content_digest
from hqqtrain.common.files import atomic_directory

MARKER = "config.json"
"""A file that every complete folder has."""

_NAME_LENGTH = 40
"""Characters of the name that an entry begins with. A file system allows 255 bytes, and lock files
and unfinished folders have longer names."""

_POLL_SECONDS = 0.2


def converted(
    name: str, source: Path, files: Sequence[str], make: Callable[[Path, str], object]
) -> Path:
    """Return the folder that was made of some files, or make it now.

    Every process of a machine may call this at the same time; one of them makes the folder.

    Args:
        name: The beginning of the name of the folder.
        source: The folder of the files.
        files: The names of the files, whose content decides.
        make: Writes the files of an empty folder, given the folder and the digest of `files`.

    Raises:
        UserError: The cache cannot be written to, a file cannot be read, or `make` fails.
    """
    digest = content_digest(source, files).removeprefix("sha256:")
    entry = cache_folder() / "converted" / f"{name[:_NAME_LENGTH]}-{digest[:24]}"
    where = f"HQQTRAIN_CACHE={cache_folder()}"
    if is_complete_entry(entry, MARKER, where):
        return entry
    while (lock := lock_entry(lock_path(entry), where)) is None:
        time.sleep(_POLL_SECONDS)
    with lock:
        if not is_complete_entry(entry, MARKER, where):
            with atomic_directory(entry) as partial:
                make(partial, digest)
    return entry
