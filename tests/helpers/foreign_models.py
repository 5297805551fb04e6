"""Load a checkpoint that another program has quantized, as a run does, and look into it."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from hqqtrain.config.model import ModelConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.formats.quantized_settings import source_settings
from hqqtrain.loading.load import load_model
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.foreign.reader import ForeignReader
from hqqtrain.models.foreign.registry import open_foreign
from hqqtrain.models.fqn import expected_shapes
from hqqtrain.models.source import resolve_source
from hqqtrain.models.weights.synthetic import open_weight_source
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS
from hqqtrain.nn.replace import replace_linears
from hqqtrain_kernels.reference import dequantize


def open_folder(folder: Path) -> ForeignReader:
    """Return the reader of a foreign checkpoint."""
    source = resolve_source(ModelConfig(name_or_path=str(folder)))
    assert source.kind == "quantized"
    assert source.foreign
    return open_foreign(source)


def dequantized(reader: ForeignReader, module: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of a layer, after checking that any split into rows has the same bits."""
    layer, tensors = reader.layers[module], []
    units = layer.layout.units
    parts = [slice(0, units // 3), slice(units // 3, units - 1), slice(units - 1, units)]
    for attribute in PACKED_PARAMETERS:
        name = f"{module}.{attribute}"
        tensors.append(reader.read(name))
        assert tensors[-1].shape == reader.shape(name)
        assert tensors[-1].dtype == reader.dtype(name)
        backward = torch.cat([tensors[-1][part] for part in parts[::-1]])
        assert torch.equal(reader.read(name, parts[::-1]), backward)
    return dequantize(*tensors, layer.layout, dtype)


def load_foreign(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model of a foreign checkpoint, loaded as a run loads it."""
    source = resolve_source(ModelConfig(name_or_path=str(folder)))
    model = build_meta(load_hf_config(source.path), dtype)
    settings = source_settings(source)
    settings.check_model(model, source.path)
    specs = {name: module.spec for name, module in settings.modules.items()}
    replace_linears(model, specs, compute_dtype=dtype, storage_dtype=torch.uint8)
    reader = open_weight_source(source, model, torch.device("cpu"))
    assert reader.check(expected_shapes(model, packed=True)) == []
    load_model(model, reader, SINGLE_PROCESS, quantized=True)
    return model.eval()
