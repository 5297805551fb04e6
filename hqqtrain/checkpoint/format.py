"""A checkpoint: all that a training is after a step, but for the frozen base.

The same files whatever the strategy and the number of ranks: full tensors by PEFT's names. It is a
PEFT adapter, too, which other tools load and `adapter.init_from` takes.

    adapter_config.json  adapter_model.safetensors   stock PEFT
    optimizer.safetensors                            `<PEFT's name>/exp_avg` and so on
    state.json                                       step, place in the data, figures so far
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

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_directory, atomic_write_json, without_nonfinite
from hqqtrain.formats.manifest import DamagedError, check_sealed, seal
from hqqtrain.formats.peft import BaseModelRef, write_adapter
from hqqtrain.formats.writer import save_tensors

FORMAT = 1

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was found whole, and its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state["step"]

    def optimizer(self) -> dict[str, Tensor]:
        """`<PEFT's name>/<key>` -> the optimizer's tensors. Raises UserError where it was altered
        since it was found whole."""
        path = self.folder / OPTIMIZER
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: was altered just now ({error}); run it again.") from error


def write_checkpoint(
    folder: Path, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor],
    config: LoraConfig, base: BaseModelRef, state: Mapping[str, Any],
) -> None:  # fmt: skip
    """Writes `folder`, complete or not at all. Raises OSError where the disk does not take it."""
    with atomic_directory(folder) as partial:
        write_adapter(partial, adapter, config, base)
        save_tensors(optimizer, partial / OPTIMIZER)
        atomic_write_json(partial / STATE, without_nonfinite({"format": FORMAT, **state}))
        seal(partial)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads every byte of `folder` before any is used.

    Raises DamagedError where something is missing or altered, or of a format unknown here.
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
