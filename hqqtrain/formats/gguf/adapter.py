"""Write an adapter as GGUF, as llama.cpp reads it: `llama-server --lora adapter.gguf`."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.formats.dense import round_finite
from hqqtrain.formats.gguf.conversion import Conversion
from hqqtrain.formats.gguf.metadata import FINGERPRINT
from hqqtrain.formats.gguf.package import import_gguf
from hqqtrain.formats.gguf.writer import DENSE_TYPES, GgufFile, TensorEntry
from hqqtrain.formats.peft import Adapter


def write_gguf_adapter(
    adapter: Adapter, path: Path, conversion: Conversion, dtype: torch.dtype, base_tensors: set[str]
) -> None:
    """Write the LoRA matrices of an adapter.

    llama.cpp has one alpha for all modules, and divides it by the rank of each. Whatever else
    scales a module becomes a factor of its B.

    Args:
        adapter: The adapter.
        path: The file.
        conversion: The names and the order of rows of the base.
        dtype: The dtype of the matrices.
        base_tensors: The names of the tensors of the base in GGUF.

    Raises:
        UserError: The base has no tensor that the adapter adapts, or a value is beyond the range
            of `dtype`.
    """
    matrices = dict(_matrices(adapter, conversion, dtype))
    for name in matrices:
        if name.removesuffix(".lora_a") not in base_tensors and name.endswith(".lora_a"):
            raise UserError(
                f"adapter: adapts {name.removesuffix('.lora_a')}, which the exported base shares "
                "with another tensor; merge the adapter with export.adapter=merge, or export the "
                "base alone with export.adapter=none."
            )
    writer = import_gguf().GGUFWriter(None, conversion.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(adapter.config.lora_alpha))
    if adapter.fingerprint:
        writer.add_string(FINGERPRINT, adapter.fingerprint)
    entries = {
        name: TensorEntry(DENSE_TYPES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in matrices.items()
    }
    with GgufFile(path, writer, entries) as file:
        for name, tensor in matrices.items():
            file.write(name, tensor)
        file.finish()


def _matrices(
    adapter: Adapter, conversion: Conversion, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield `<tensor>.lora_a` [r, in_features] and `<tensor>.lora_b` [out_features, r]."""
    for module in adapter.modules:
        name = conversion.name(f"{module}.weight")
        A, B = adapter.matrix(module, "A"), adapter.matrix(module, "B")
        B = B * (adapter.scaling(module) * len(A) / adapter.config.lora_alpha)
        if (order := conversion.order(f"{module}.weight")) is not None:
            B = B[order]
        yield f"{name}.lora_a", round_finite(f"{module}.lora_A", A, dtype)
        yield f"{name}.lora_b", round_finite(f"{module}.lora_B", B, dtype)
