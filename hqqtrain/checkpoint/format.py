"""A checkpoint: the whole state of a training after a step, except for the frozen base.

Its files do not depend on the strategy or on the number of ranks: tensors are full and have PEFT's
names. A checkpoint is also a PEFT adapter, which other tools load and `adapter.init_from` accepts.

    adapter_config.json  adapter_model.safetensors   as PEFT writes them
    optimizer.safetensors                            `<PEFT's name>/exp_avg` and so on
    state.json                                       step, position in the data, results so far
    manifest.json                                    sizes and checksums of the other files

A training state passes five modules on its way to the disk: `snapshot.py` copies it to the host of
rank 0, `manager.py` decides when and starts a thread, this module writes the files, `store.py`
knows the folder of each checkpoint and deletes old ones, and `resume.py` finds one to resume from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_directory, atomic_write_json, without_nonfinite
from hqqtrain.common.reading import load_json
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.formats.manifest import DamagedError, check_sealed, seal
from hqqtrain.formats.peft import load_adapter, write_adapter
from hqqtrain.formats.writer import save_tensors
from hqqtrain.rundir.layout import checkpoint_name

FORMAT = 1
"""Version of the format, which state.json names."""

_STATE_TYPES = {
    "texts": dict, "record": dict, "trained": dict, "strategy": str, "world_size": int,
}  # fmt: skip
"""Types of values in state.json that are used before the training begins."""

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums were verified: its folder and the content of state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return self.state["step"]

    def optimizer(self) -> dict[str, Tensor]:
        """Load the optimizer's tensors by `<PEFT's name>/<key>`.

        Raises:
            UserError: The file was changed after its checksum was verified.
        """
        path = self.folder / OPTIMIZER
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: was changed during the run ({error}); run again.") from error

    def parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters by PEFT's names."""
        return load_adapter(self.folder).state


def write_checkpoint(
    folder: Path, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor],
    config: LoraConfig, base: BaseModelRef, state: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write a checkpoint completely or not at all.

    Raises:
        OSError: The disk is full or fails.
    """
    with atomic_directory(folder) as partial:
        write_adapter(partial, adapter, config, base)
        save_tensors(optimizer, partial / OPTIMIZER)
        atomic_write_json(partial / STATE, without_nonfinite({"format": FORMAT, **state}))
        seal(partial)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify every byte of a checkpoint and read its state.json.

    Raises:
        DamagedError: A file is missing or changed, this version does not know the format, or the
            folder has the name of another step.
    """
    check_sealed(folder)
    try:
        state = load_json(folder / STATE)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{folder / STATE}: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else "unknown"
        raise DamagedError(f"{folder / STATE}: format {found}, this version reads {FORMAT}")
    step = state.get("step")
    if not isinstance(step, int) or folder.name != checkpoint_name(step):
        raise DamagedError(f"{folder}: is the checkpoint of step {step}, renamed or copied")
    for key, type_ in _STATE_TYPES.items():
        if not isinstance(state.get(key, type_()), type_):
            raise DamagedError(f"{folder / STATE}: {key} is {str(state[key])[:40]}, not {type_}")
    return Checkpoint(folder, state)
