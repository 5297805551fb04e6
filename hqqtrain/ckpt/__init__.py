"""The files of a run: written completely or not at all, and identified by a fingerprint."""

from hqqtrain.ckpt.adapter import Adapter, Base, load_adapter, save_adapter
from hqqtrain.ckpt.atomic import atomic_directory, atomic_write_json
from hqqtrain.ckpt.background import Background
from hqqtrain.ckpt.card import AdapterCard
from hqqtrain.ckpt.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from hqqtrain.ckpt.export import dense_tensors, export_dense
from hqqtrain.ckpt.fingerprint import Fingerprint
from hqqtrain.ckpt.manifest import DamagedError
from hqqtrain.ckpt.provenance import MADE_FROM, made_from, stamp, versions
from hqqtrain.ckpt.quantized import (
    ModuleSettings,
    QuantizedSettings,
    check_quantized,
    model_tensors,
    quantized_settings,
    reader_tensors,
    save_quantized,
)  # fmt: skip
from hqqtrain.ckpt.rundir import RunDirectory
from hqqtrain.ckpt.store import CheckpointStore

__all__ = [
    "MADE_FROM", "Adapter", "AdapterCard", "Background", "Base", "Checkpoint", "CheckpointStore",
    "DamagedError", "Fingerprint", "ModuleSettings", "QuantizedSettings", "RunDirectory",
    "atomic_directory", "atomic_write_json", "check_quantized", "dense_tensors", "export_dense",
    "load_adapter", "made_from", "model_tensors", "quantized_settings", "read_checkpoint",
    "reader_tensors", "save_adapter", "save_quantized", "stamp", "versions", "write_checkpoint",
]  # fmt: skip
