"""The formats of other programs that can be read, by `quant_method` in config.json."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.models.foreign import auto_round, awq, compressed_tensors, gptq, hqq
from hqqtrain.models.foreign.base import AGAIN, ForeignLayer, StoredTensors
from hqqtrain.models.foreign.reader import ForeignReader
from hqqtrain.models.source import read_quantization_config

FindLayers = Callable[[StoredTensors, Mapping[str, Any]], dict[str, ForeignLayer]]
"""Returns the layers of a checkpoint, given its tensors and its `quantization_config`."""

FORMATS: dict[str, FindLayers] = {
    "hqq": hqq.find_layers,
    "gptq": gptq.find_layers,
    "awq": awq.find_layers,
    "auto-round": auto_round.find_layers,
    "compressed-tensors": compressed_tensors.find_layers,
}
"""The formats; `hqqtrain.common.packed_folders.FOREIGN_METHODS` has their names without torch."""


def open_foreign(folder: Path, method: str, *, pin_memory: bool = False) -> ForeignReader:
    """Open a checkpoint that another program has quantized.

    Args:
        folder: The folder.
        method: The name of the format, a key of `FORMATS`.
        pin_memory: As in `SafetensorsReader`.

    Raises:
        UserError: The checkpoint is damaged, or cannot be taken over.
    """
    config = read_quantization_config(folder)
    reader = ForeignReader(folder, lambda stored: FORMATS[method](stored, config),
                           pin_memory=pin_memory)  # fmt: skip
    if not reader.layers:
        raise UserError(f"{folder}: contains no layer that {method} has quantized; {AGAIN}")
    return reader
