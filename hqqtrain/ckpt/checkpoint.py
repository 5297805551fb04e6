"""The format of a checkpoint: the whole training state after a step, without the frozen base.

The files are the same for every strategy and world size: full tensors by PEFT's names. A checkpoint
is also a PEFT adapter, which other tools can load and `adapter.init_from` accepts.

    adapter_config.json  adapter_model.safetensors   stock PEFT
    optimizer.safetensors                            `<PEFT's name>/exp_avg` and so on
    state.json                                       step, position in the data, results so far
    manifest.json                                    sizes and checksums of these
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hqqtrain.ckpt.adapter import Base, write_adapter
from hqqtrain.ckpt.atomic import atomic_directory, atomic_write_json, without_nonfinite
from hqqtrain.ckpt.manifest import DamagedError, check_sealed, seal
from hqqtrain.ckpt.tensors import save_tensors
from hqqtrain.config import UserError

FORMAT = 1
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose checksums were verified, and its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return self.state["step"]

    def optimizer(self) -> dict[str, Tensor]:
        """Load the optimizer's tensors by `<PEFT's name>/<key>`.

        Raises:
            UserError: the file was changed after its checksum was verified.
        """
        path = self.folder / OPTIMIZER
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: was changed during the run ({error}); run again.") from error


def write_checkpoint(
    folder: Path, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor],
    config: LoraConfig, base: Base, state: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write a checkpoint completely or not at all.

    Raises:
        OSError: the disk is full or fails.
    """
    with atomic_directory(folder) as partial:
        write_adapter(partial, adapter, config, base)
        save_tensors(optimizer, partial / OPTIMIZER)
        atomic_write_json(partial / STATE, without_nonfinite({"format": FORMAT, **state}))
        seal(partial)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify every byte of a checkpoint and read its state.json.

    Raises:
        DamagedError: a file is missing or changed, or this version does not know the format.
    """
    check_sealed(folder)
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{folder / STATE}: {error}") from error
    if state.get("format") != FORMAT:
        raise DamagedError(
            f"{folder / STATE}: format {state.get('format')}, this version reads {FORMAT}"
        )
    return Checkpoint(folder, state)
