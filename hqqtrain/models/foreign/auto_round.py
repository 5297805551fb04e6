"""Checkpoints of AutoRound's own format, which packs as GPTQ or AWQ do; `packing_format` says how.

With asymmetric codes it stores zeros as they are, as the second version of GPTQ's format does.
"""

from collections.abc import Mapping
from typing import Any

from hqqtrain.models.foreign import awq, gptq
from hqqtrain.models.foreign.base import ForeignLayer, StoredTensors, refuse


def find_layers(stored: StoredTensors, config: Mapping[str, Any]) -> dict[str, ForeignLayer]:
    """Return the layers of an AutoRound checkpoint, by module.

    Raises:
        UserError: As in `gptq.find_layers` and `awq.find_layers`, or activations are quantized.
    """
    packing = str(config.get("packing_format", "auto_round:auto_gptq"))
    if config.get("data_type", "int") != "int" or (config.get("act_bits") or 16) < 16:
        kind = f"data_type={config.get('data_type')}, act_bits={config.get('act_bits')}"
        raise refuse(stored, kind, "only integer weights with full-precision activations are")
    if config.get("rotation_config"):
        raise refuse(stored, "rotation_config", "only weights that are not rotated are")
    if "awq" in packing:
        return awq.find_layers(stored, {"bits": config.get("bits", 4)})
    stored_minus_one = "gptq" in packing and "gptqmodel" not in packing
    return gptq.layers_with_offset(stored, int(stored_minus_one), config)
