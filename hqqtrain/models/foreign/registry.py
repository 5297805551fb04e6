"""The formats of other programs that can be read, by `quant_method` in config.json."""

from collections.abc import Callable, Mapping
from typing import Any

from hqqtrain.common.errors import UserError, describe_error
from hqqtrain.models.foreign import auto_round, awq, compressed_tensors, gptq, hqq
from hqqtrain.models.foreign.base import AGAIN, ForeignLayer, StoredTensors
from hqqtrain.models.foreign.gguf_reader import GgufReader
from hqqtrain.models.foreign.reader import ForeignReader
from hqqtrain.models.source import ModelSource, read_quantization_config

FindLayers = Callable[[StoredTensors, Mapping[str, Any]], dict[str, ForeignLayer]]
"""Returns the layers of a checkpoint, given its tensors and its `quantization_config`."""

FORMATS: dict[str, FindLayers] = {
    "hqq": hqq.find_layers,
    "gptq": gptq.find_layers,
    "awq": awq.find_layers,
    "auto-round": auto_round.find_layers,
    "compressed-tensors": compressed_tensors.find_layers,
}
"""The formats of safetensors files.

`hqqtrain.common.packed_folders.FOREIGN_METHODS` has their names without torch, and GGUF's.
"""


def open_foreign(source: ModelSource, *, pin_memory: bool = False) -> ForeignReader:
    """Open the weights of a `foreign` source.

    Args:
        source: The source.
        pin_memory: As in `SafetensorsReader`.

    Raises:
        UserError: The checkpoint is damaged, or cannot be taken over.
    """
    if source.weights_file:
        reader: ForeignReader = GgufReader(source.path, source.weights_file, pin_memory=pin_memory)
    else:
        config, find = read_quantization_config(source.path), FORMATS[source.foreign or ""]
        try:
            reader = ForeignReader(source.path, lambda s: find(s, config), pin_memory=pin_memory)
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as error:  # of another type
            raise UserError(
                f"{source.path}: the settings of its layers are damaged ({describe_error(error)}); "
                f"{AGAIN}"
            ) from error
    if not reader.layers:
        raise UserError(
            f"{source.path}: contains no layer that {source.foreign} has quantized; {AGAIN}"
        )
    return reader
