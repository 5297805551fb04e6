"""Write a stream of tensors as a Hugging Face checkpoint: shards of bounded size with an index.

The stream may exceed memory: a rank holds at most one shard, plus one that is being written. The
assignment of tensors to files does not depend on the number of ranks.
"""

import concurrent.futures as futures
import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hqqtrain.common.files import atomic_directory, atomic_write_json, fsync_path, temporary_path
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.formats.manifest import FileDigest, file_digest
from hqqtrain.models.weights.safetensors import INDEX, SINGLE

MAX_SHARD_BYTES = 2_000_000_000


class WriteResult(NamedTuple):
    """The bytes of all tensors, and the sizes and checksums of the files if these were hashed."""

    bytes: int
    digests: dict[str, FileDigest]


@contextmanager
def collective_atomic_directory(path: Path, comm: Communicator) -> Iterator[Path]:
    """Share an `atomic_directory` among all ranks. Collective.

    Rank 0 creates the folder and renames it when all ranks are done. If one rank fails, the folder
    is removed and all ranks raise.
    """
    with ExitStack() as stack:
        with comm.raise_on_all_ranks():
            if comm.is_main:
                stack.enter_context(atomic_directory(path))
        with comm.raise_on_all_ranks():
            yield temporary_path(path)
        with comm.raise_on_all_ranks():
            stack.close()


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *,
                 max_bytes: int = MAX_SHARD_BYTES, comm: Communicator = SINGLE_PROCESS,
                 hashed: bool = False) -> WriteResult:  # fmt: skip
    """Write a stream of tensors into `folder`. Collective.

    A single file is named model.safetensors; several get transformers' numbered names and an index.
    A rank whose writes fail still consumes the stream to its end, because the stream may consist of
    collective gathers. Its error is raised on all ranks afterwards.

    Args:
        tensors: (name, tensor), the same stream on every rank.
        folder: The existing folder to write into.
        max_bytes: The largest size of a shard. A larger tensor gets its own shard.
        comm: The ranks; each writes every `comm.size`-th shard.
        hashed: Whether to compute checksums for a manifest.

    Returns:
        The bytes of all tensors, and file name -> size and checksum if `hashed`.
    """
    weight_map: dict[str, int] = {}
    with comm.raise_on_all_ranks(), _ShardWriter(folder, comm, hashed) as writer:
        size = total = number = 0
        for name, tensor in tensors:
            if name in weight_map:
                raise ValueError(f"tensor {name} occurs twice")
            if size and size + tensor.nbytes > max_bytes:
                writer.save(number)
                number, size = number + 1, 0
            weight_map[name] = number
            writer.add(name, tensor, number)
            size, total = size + tensor.nbytes, total + tensor.nbytes
        writer.save(number)
        writer.finish()
    # The final names contain the number of shards, which is known only now.
    names = _shard_names(number + 1)
    if comm.is_main:
        _rename_shards(folder, weight_map, names, total)
    digests = [item for rank in comm.gather(writer.digests) for item in rank.items()]
    return WriteResult(total, {names[number]: found for number, found in digests})


class _ShardWriter:
    """Writes this rank's shards on a background thread, one after the other."""

    def __init__(self, folder: Path, comm: Communicator, hashed: bool) -> None:
        self._folder, self._comm, self._hashed = folder, comm, hashed
        self.digests: dict[int, FileDigest] = {}
        self._shard: dict[str, torch.Tensor] = {}
        self._saving: list[futures.Future[None]] = []
        self._pool = futures.ThreadPoolExecutor(1, "writing")

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, name: str, tensor: torch.Tensor, number: int) -> None:
        """Add a tensor to shard `number`, if this rank writes that shard."""
        if self._is_mine(number) and not self._has_failed():
            self._shard[name] = _owned(tensor)

    def save(self, number: int) -> None:
        """Start to write the complete shard `number`, after waiting for the previous one.

        Waiting bounds the memory to one shard in work and one being written.
        """
        if self._is_mine(number):
            futures.wait(self._saving)
        if self._is_mine(number) and not self._has_failed():
            self._saving.append(self._pool.submit(self._write, self._shard, number))
            self._shard = {}

    def finish(self) -> None:
        """Wait for all writes and raise their errors."""
        for saving in self._saving:
            saving.result()

    def _write(self, shard: dict[str, torch.Tensor], number: int) -> None:
        path = _temporary_path(self._folder, number)
        save_tensors(shard, path)
        fsync_path(path)  # only the machine that has written a file can flush it
        if self._hashed:
            # Here the file is still in the page cache, and the next shard is gathered meanwhile.
            self.digests[number] = file_digest(path)

    def _has_failed(self) -> bool:
        return any(saving.done() and saving.exception() for saving in self._saving)

    def _is_mine(self, number: int) -> bool:
        return number % self._comm.size == self._comm.rank


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous CPU tensor with its own storage; safetensors refuses shared storage."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def _temporary_path(folder: Path, number: int) -> Path:
    """Return the path of a shard until the number of shards is known."""
    return folder / f"shard-{number}"


def _shard_names(count: int) -> list[str]:
    """Return the file names that transformers gives to `count` shards."""
    several = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return several if count > 1 else [SINGLE]


def _rename_shards(folder: Path, weight_map: dict[str, int], names: list[str], total: int) -> None:
    for number, name in enumerate(names):
        _temporary_path(folder, number).rename(folder / name)
    if len(names) > 1:
        index = {name: names[number] for name, number in sorted(weight_map.items())}
        atomic_write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a safetensors file with `format: pt` and `metadata` in its header.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        # safetensors wraps the system's error in its own: recover the number from the text.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
