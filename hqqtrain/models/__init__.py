"""Models: resolve a name, build the architecture on meta, read weights, and estimate memory."""

from hqqtrain.models.build import (
    build_meta,
    config_of,
    load_config,
    restore_buffers,
    shipped_config,
)
from hqqtrain.models.estimate import TRAINED_LOGITS, Estimate, estimate
from hqqtrain.models.fits import check_fits, oom_advice
from hqqtrain.models.memory import Available, available
from hqqtrain.models.names import (
    adapter_name,
    base_model,
    base_tensors,
    expected_shapes,
    is_adapter,
    is_packed,
    plain_name,
    tie,
    tied_names,
)  # fmt: skip
from hqqtrain.models.reader import CheckpointReader
from hqqtrain.models.source import Source, resolve_source
from hqqtrain.models.synthetic import SyntheticReader, open_weights
from hqqtrain.models.tokenizer import load_tokenizer

__all__ = [
    "TRAINED_LOGITS", "Available", "CheckpointReader", "Estimate", "Source", "SyntheticReader",
    "adapter_name", "available",
    "base_model", "base_tensors", "build_meta", "check_fits", "config_of", "estimate",
    "expected_shapes", "is_adapter", "is_packed", "load_config", "load_tokenizer", "oom_advice",
    "open_weights", "plain_name", "resolve_source", "restore_buffers", "shipped_config", "tie",
    "tied_names",
]  # fmt: skip
