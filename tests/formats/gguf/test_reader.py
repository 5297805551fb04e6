"""Layers are read in the order of rows of the checkpoint."""

import torch
from exports import layers, model_export

from hqqtrain.config.export import ExportConfig
from hqqtrain.formats.gguf.block_types import Q4_1
from hqqtrain.formats.gguf.conversion import FamilyConversion
from hqqtrain.formats.gguf.reader import GgufLayers
from hqqtrain.formats.registry import FORMATS


def test_layers_are_ours(make_wide, tmp_path):
    trained = make_wide(group_size=32, solver="rtn", nbits=4, sizes={
        "hidden_size": 64, "intermediate_size": 128, "vocab_size": 4096})  # fmt: skip
    export = model_export(trained)
    FORMATS["gguf"].configured(ExportConfig()).write(export, tmp_path / "out")
    kinds = dict.fromkeys(trained.settings.modules, Q4_1)
    conversion = FamilyConversion(export, torch.float16)
    read = GgufLayers(tmp_path / "out" / "model-Q4_1.gguf", conversion, kinds)
    for name, layer in layers(trained).items():
        weight = layer.dequantize(torch.float32)
        torch.testing.assert_close(read.stored(name).weight, weight, rtol=0, atol=2e-4)
        torch.testing.assert_close(read.linear(name).dequantize(torch.float32),
                                   read.stored(name).weight)  # fmt: skip
