"""Folders with the hidden states of the full-precision model, which runs share.

All ranks write the hidden states of their batches, in safetensors files, and an index names the
file of each batch. So runs with another number of ranks can read them. A manifest shows whether a
file was torn or altered.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hqqtrain.common.cache_entry import is_complete_entry
from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write_json, check_owner, fsync_path
from hqqtrain.common.reading import load_json
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.evaluation.streamed_reference import HiddenStates
from hqqtrain.formats.manifest import DamagedError, check_sealed, seal
from hqqtrain.formats.writer import collective_atomic_directory, save_tensors
from hqqtrain.loading.cache import shared_entry
from hqqtrain.models.layerwise import LayerwiseModel

logger = logging.getLogger(__name__)

INDEX = "reference.json"
"""The file that says what an entry is made from, and in which file each batch is."""

MAX_FILE_BYTES = 1 << 28
"""Bytes after which the next file begins; safetensors copies a file in memory to write it."""


@dataclass(frozen=True)
class ReferenceCache:
    """The entries in `eval.cache_dir`.

    Attributes:
        root: The folder of all entries.
        where: The config key of the cache and its value, for messages.
        comm: All ranks of the run.
        preemption: Knows whether a rank was asked to stop.
    """

    root: Path
    where: str
    comm: Communicator
    preemption: PreemptionHandler

    def find_or_compute(
        self,
        model_name: str,
        made_from: Mapping[str, Any],
        keys: list[str],
        layerwise: LayerwiseModel,
        compute: Callable[[], HiddenStates],
    ) -> HiddenStates:
        """Return the hidden states of this rank's batches. Collective.

        Args:
            model_name: The name of the model, for people.
            made_from: All that decides the hidden states apart from the batches, as JSON values,
                the same on all ranks.
            keys: The digests of the batches of this rank.
            layerwise: The model, which learns what its decoder layers return.
            compute: Computes the hidden states if there is no entry, or a damaged one. Collective.

        Raises:
            UserError: The folder cannot be written to or trusted, or the nodes do not share it.
            PreemptedError: The run was asked to stop while it waited for another run.
        """
        comm = self.comm
        keys_of_ranks = comm.all_gather_object(keys)
        every_key = sorted({key for of_rank in keys_of_ranks for key in of_rank})
        identity = {**made_from, "batches": _digest(every_key)}
        short_name = model_name.rstrip("/").rpartition("/")[2]
        folder = self.root / f"{short_name}-{_digest(identity)[:24]}"
        with comm.raise_on_all_ranks():
            if comm.is_main:
                check_owner(self.root, self.where)

        def is_complete() -> bool:
            return self._is_complete(folder, every_key)

        with shared_entry(folder, is_complete, self.where, comm, self.preemption) as entry:
            if entry.is_complete:
                with comm.raise_on_all_ranks():
                    return self._read(folder, keys, layerwise)
            if comm.is_main and folder.exists():
                logger.warning("%s: %s is damaged, so it is made again", self.where, folder)
            states = compute()
            known = {key for of_rank in keys_of_ranks[: comm.rank] for key in of_rank}
            own = {key: hidden for key, hidden in states.items() if key not in known}
            description = {"made_from": mask_secrets(identity), "tuple_size": layerwise.tuple_size}
            self._write(folder, own, description)
            return states

    def _is_complete(self, folder: Path, keys: list[str]) -> bool:
        """Whether the entry in `folder` is what was written, and has all batches of all ranks."""
        if not is_complete_entry(folder, INDEX, self.where.partition("=")[0]):
            return False
        try:
            check_sealed(folder)
            return set(keys) <= set(load_json(folder / INDEX)["batches"])
        except (DamagedError, OSError, ValueError, KeyError, TypeError):
            return False

    def _read(self, folder: Path, keys: list[str], layerwise: LayerwiseModel) -> HiddenStates:
        """Return the hidden states of some batches."""
        by_file: dict[Path, list[str]] = {}
        states = HiddenStates()
        try:
            index = load_json(folder / INDEX)
            for key in keys:
                by_file.setdefault(folder / Path(index["batches"][key]).name, []).append(key)
            for path, in_file in by_file.items():
                with safe_open(path, framework="pt") as file:
                    # A copy owns its memory, and does not keep the file mapped.
                    states |= {key: file.get_tensor(key).clone() for key in in_file}
            layerwise.tuple_size = index["tuple_size"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.where}: {folder} cannot be read ({error!r}). Remove the folder."
            ) from error
        return states

    def _write(self, folder: Path, states: HiddenStates, description: Mapping[str, Any]) -> None:
        """Write the hidden states of all ranks, each its own. Collective."""
        comm, files = self.comm, dict(_files(states, self.comm.rank))
        mine = {key: name for name, part in files.items() for key in part}
        batches = {key: name for each in comm.all_gather_object(mine) for key, name in each.items()}
        with collective_atomic_directory(folder, comm) as partial:
            with comm.raise_on_all_ranks():
                for name, part in files.items():
                    save_tensors(part, partial / name)
                    fsync_path(partial / name)  # only the machine that has written it can flush it
            if comm.is_main:
                atomic_write_json(partial / INDEX, {**description, "batches": batches})
                seal(partial)


def _files(states: HiddenStates, rank: int) -> Iterator[tuple[str, HiddenStates]]:
    """Yield the name and the content of each file that a rank writes."""
    part, size, number = HiddenStates(), 0, 0
    for key, hidden in states.items():
        if part and size + hidden.nbytes > MAX_FILE_BYTES:
            yield f"rank-{rank:05}-{number:05}.safetensors", part
            part, size, number = HiddenStates(), 0, number + 1
        part[key] = hidden
        size += hidden.nbytes
    if part:
        yield f"rank-{rank:05}-{number:05}.safetensors", part


def _digest(value: Any) -> str:
    """Return the sha256, in hex, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
