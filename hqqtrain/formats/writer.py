"""Writing a stream of tensors as a Hugging Face checkpoint: shards of bounded size, an index.

The stream may be longer than memory: a rank holds a shard, and one that is on its way to the disk.
Which tensors share a file does not depend on how many ranks write.
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
from hqqtrain.formats.manifest import FileFacts, file_digest
from hqqtrain.models.weights.safetensors import INDEX, SINGLE

MAX_SHARD_BYTES = 2_000_000_000


class WriteResult(NamedTuple):
    """The bytes of all tensors; the facts of the files they are in, if these were hashed."""

    bytes: int
    facts: dict[str, FileFacts]


@contextmanager
def collective_atomic_directory(path: Path, comm: Communicator) -> Iterator[Path]:
    """`atomic_directory` for all ranks: the first makes it, and puts it in place when all are done.

    Where one rank fails, nothing is left of it, and all raise. Collective.
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
    """Write `tensors` (name, tensor) into `folder`; `hashed`: for a manifest.

    One file is named model.safetensors; several get transformers' numbered names and an index.
    A tensor larger than `max_bytes` has a shard of its own. Every rank gives the same stream, and
    writes each `processes.size`-th shard. Collective; a rank that cannot write goes on to the end
    of the stream, which may be one of gathers.
    """
    weight_map: dict[str, int] = {}
    with comm.raise_on_all_ranks(), _Writer(folder, comm, hashed) as writer:
        size = total = number = 0
        for name, tensor in tensors:
            if name in weight_map:
                raise ValueError(f"tensor {name} comes twice")
            if size and size + tensor.nbytes > max_bytes:
                writer.save(number)
                number, size = number + 1, 0
            weight_map[name] = number
            writer.add(name, tensor, number)
            size, total = size + tensor.nbytes, total + tensor.nbytes
        writer.save(number)
        writer.finish()
    names = _names(number + 1)
    if comm.is_main:
        _name_shards(folder, weight_map, names, total)
    facts = [item for rank in comm.gather(writer.facts) for item in rank.items()]
    return WriteResult(total, {names[number]: found for number, found in facts})


class _Writer:
    """Writes this rank's shards on a thread of its own, one after the other."""

    def __init__(self, folder: Path, comm: Communicator, hashed: bool) -> None:
        self._folder, self._comm, self._hashed = folder, comm, hashed
        self.facts: dict[int, FileFacts] = {}
        self._shard: dict[str, torch.Tensor] = {}
        self._saving: list[futures.Future[None]] = []
        self._pool = futures.ThreadPoolExecutor(1, "writing")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, name: str, tensor: torch.Tensor, number: int) -> None:
        """A tensor of shard `number`, which other ranks only look at."""
        if self._is_mine(number) and not self._has_failed():
            self._shard[name] = _owned(tensor)

    def save(self, number: int) -> None:
        """Shard `number` is complete. Waits for the one before it, so that they do not pile up."""
        if self._is_mine(number):
            futures.wait(self._saving)
        if self._is_mine(number) and not self._has_failed():
            self._saving.append(self._pool.submit(self._write, self._shard, number))
            self._shard = {}

    def finish(self) -> None:
        """Raises what saving has raised."""
        for saving in self._saving:
            saving.result()

    def _write(self, shard: dict[str, torch.Tensor], number: int) -> None:
        """Hashed here, the file comes from memory, and the next shard is gathered meanwhile."""
        _save(shard, self._folder, number)
        if self._hashed:
            self.facts[number] = file_digest(_path(self._folder, number))

    def _has_failed(self) -> bool:
        return any(saving.done() and saving.exception() for saving in self._saving)

    def _is_mine(self, number: int) -> bool:
        return number % self._comm.size == self._comm.rank


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU and contiguous, in memory of its own: safetensors refuses shared storage."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def _path(folder: Path, number: int) -> Path:
    """Of a shard, until it is known how many there are."""
    return folder / f"shard-{number}"


def _save(shard: dict[str, torch.Tensor], folder: Path, number: int) -> None:
    path = _path(folder, number)
    save_tensors(shard, path)
    fsync_path(path)  # only this machine can


def _names(count: int) -> list[str]:
    """transformers' names of `count` shards; they carry the number, known only at the end."""
    several = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return several if count > 1 else [SINGLE]


def _name_shards(folder: Path, weight_map: dict[str, int], names: list[str], total: int) -> None:
    for number, name in enumerate(names):
        _path(folder, number).rename(folder / name)
    if len(names) > 1:
        index = {name: names[number] for name, number in sorted(weight_map.items())}
        atomic_write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """`save_file`, with "format" in the metadata. Raises OSError where the disk does not take it:
    safetensors hides the system's in an error of its own."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
