"""Write a stream of tensors as a Hugging Face checkpoint: shards of bounded size with an index.

The stream may be larger than the memory: a rank holds at most the shard that it collects and the
one that it writes. The assignment of tensors to files does not depend on the number of ranks.
"""

import concurrent.futures as futures
import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hqqtrain.common.files import atomic_directory, atomic_write_json, fsync_path, temporary_path
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.formats.manifest import FileDigest, file_digest
from hqqtrain.models.weights.safetensors import INDEX_FILE_NAME, SINGLE_FILE_NAME

MAX_SHARD_BYTES = 2_000_000_000
"""Default limit of a shard, which bounds the memory of a rank that writes."""


class WriteResult(NamedTuple):
    """Result of `write_shards`.

    Attributes:
        bytes: The bytes of all tensors.
        digests: File name -> size and checksum; empty if checksums were not computed.
    """

    bytes: int
    digests: dict[str, FileDigest]


@contextmanager
def collective_atomic_directory(
    path: Path, comm: Communicator, max_modes: Mapping[str, int] = MappingProxyType({})
) -> Iterator[Path]:
    """Share an `atomic_directory` among all ranks. Collective.

    Rank 0 creates the folder and renames it when all ranks are done. If one rank fails, the folder
    is removed and all ranks raise.
    """
    with ExitStack() as stack:
        with comm.raise_on_all_ranks():
            if comm.is_main:
                stack.enter_context(atomic_directory(path, max_modes))
        with comm.raise_on_all_ranks():
            yield temporary_path(path)
        with comm.raise_on_all_ranks():
            stack.close()


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *,
                 max_bytes: int = MAX_SHARD_BYTES, comm: Communicator = SINGLE_PROCESS,
                 compute_checksums: bool = False) -> WriteResult:  # fmt: skip
    """Write a stream of tensors into `folder`. Collective.

    A single file is named model.safetensors. Several files get transformers' numbered names and an
    index.
    A rank whose writes fail still consumes the stream to its end, because the stream may consist of
    collective gathers. Its error is raised on all ranks afterwards.

    Args:
        tensors: (name, tensor), the same stream on every rank.
        folder: The existing folder to write into.
        max_bytes: The largest size of a shard. A larger tensor gets its own shard.
        comm: The ranks; rank r writes the shards r, r + `comm.size`, ...
        compute_checksums: Whether to compute checksums for a manifest.

    """
    weight_map: dict[str, int] = {}  # tensor name -> number of its shard
    with comm.raise_on_all_ranks(), _ShardWriter(folder, comm, compute_checksums) as writer:
        shard_bytes = total_bytes = number = 0
        for name, tensor in tensors:
            if name in weight_map:
                raise ValueError(f"tensor {name} occurs twice")
            if shard_bytes and shard_bytes + tensor.nbytes > max_bytes:
                writer.save(number)
                number, shard_bytes = number + 1, 0
            weight_map[name] = number
            writer.add(name, tensor, number)
            shard_bytes += tensor.nbytes
            total_bytes += tensor.nbytes
        writer.save(number)
        writer.finish()
    # The final names contain the number of shards, which is known only now.
    file_names = _shard_file_names(number + 1)
    if comm.is_main:
        _rename_shards(folder, weight_map, file_names, total_bytes)
    digests = {
        file_names[number]: digest
        for of_rank in comm.all_gather_object(writer.digests)
        for number, digest in of_rank.items()
    }
    return WriteResult(total_bytes, digests)


class _ShardWriter:
    """Writes this rank's shards on a background thread, one after the other."""

    def __init__(self, folder: Path, comm: Communicator, compute_checksums: bool) -> None:
        self._folder, self._comm, self._compute_checksums = folder, comm, compute_checksums
        self.digests: dict[int, FileDigest] = {}  # by the numbers of the shards
        self._shard: dict[str, torch.Tensor] = {}  # the tensors that the next file will contain
        self._writes: list[futures.Future[None]] = []
        self._pool = futures.ThreadPoolExecutor(1, "writing")

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, name: str, tensor: torch.Tensor, number: int) -> None:
        """Add a tensor to shard `number`, if this rank writes that shard."""
        if self._is_mine(number) and not self._has_failed():
            self._shard[name] = _to_contiguous_cpu(tensor)

    def save(self, number: int) -> None:
        """Start to write the complete shard `number`, after waiting for the previous one.

        The wait bounds the memory to the shard that is collected and the one that is written.
        """
        if not self._is_mine(number):
            return
        futures.wait(self._writes)
        if not self._has_failed():
            self._writes.append(self._pool.submit(self._write, self._shard, number))
            self._shard = {}

    def finish(self) -> None:
        """Wait for all writes and raise their errors."""
        for write in self._writes:
            write.result()

    def _write(self, shard: dict[str, torch.Tensor], number: int) -> None:
        path = _temporary_path(self._folder, number)
        save_tensors(shard, path)
        fsync_path(path)  # only the machine that has written a file can flush it
        if self._compute_checksums:
            # Here the file is still in the page cache, and the next shard is gathered meanwhile.
            self.digests[number] = file_digest(path)

    def _has_failed(self) -> bool:
        return any(write.done() and write.exception() for write in self._writes)

    def _is_mine(self, number: int) -> bool:
        return number % self._comm.size == self._comm.rank


def _to_contiguous_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous CPU tensor with its own storage; safetensors refuses shared storage."""
    tensor = tensor.detach().cpu().contiguous()
    owns_storage = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if owns_storage else tensor.clone()


def _temporary_path(folder: Path, number: int) -> Path:
    """Return the path of a shard until the number of shards is known."""
    return folder / f"shard-{number}"


def _shard_file_names(count: int) -> list[str]:
    """Return the file names that transformers gives to `count` shards."""
    if count == 1:
        return [SINGLE_FILE_NAME]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _rename_shards(
    folder: Path, weight_map: dict[str, int], file_names: list[str], total_bytes: int
) -> None:
    """Give the shards their final names, and write the index of several shards."""
    for number, file_name in enumerate(file_names):
        _temporary_path(folder, number).rename(folder / file_name)
    if len(file_names) > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: file_names[n] for name, n in sorted(weight_map.items())},
        }
        atomic_write_json(folder / INDEX_FILE_NAME, index)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a safetensors file with `format: pt` and `metadata` in its header.

    Raises:
        OSError: The disk is full or fails.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        # safetensors wraps the system's error in its own: recover the errno from the text.
        match = re.search(r"os error (\d+)", str(error))
        raise OSError(int(match[1]) if match else errno.EIO, str(error), str(path)) from error
