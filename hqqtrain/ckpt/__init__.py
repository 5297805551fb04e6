"""What a run leaves on disk: complete or absent, and recognisable by its fingerprint."""

from hqqtrain.ckpt.adapter import Adapter, load_adapter, save_adapter
from hqqtrain.ckpt.atomic import atomic_directory, atomic_write_json, atomic_write_text
from hqqtrain.ckpt.card import AdapterCard
from hqqtrain.ckpt.export import dense_tensors, export_dense
from hqqtrain.ckpt.fingerprint import Fingerprint
from hqqtrain.ckpt.provenance import stamp, versions
from hqqtrain.ckpt.quantized import (
    ModuleSettings,
    QuantizedSettings,
    model_tensors,
    quantized_settings,
    reader_tensors,
    save_quantized,
)  # fmt: skip
from hqqtrain.ckpt.rundir import RunDirectory

__all__ = [
    "Adapter", "AdapterCard", "Fingerprint", "ModuleSettings", "QuantizedSettings",
    "RunDirectory", "atomic_directory", "atomic_write_json", "atomic_write_text", "dense_tensors",
    "export_dense", "load_adapter", "model_tensors", "quantized_settings", "reader_tensors",
    "save_adapter", "save_quantized", "stamp", "versions",
]  # fmt: skip
