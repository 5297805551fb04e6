"""Both sources of weights fulfill the protocol, with the same shapes and counts of bytes."""

import pytest
import torch

from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.fqn import expected_shapes
from hqqtrain.models.weights.base import WeightSource
from hqqtrain.models.weights.safetensors import SafetensorsReader
from hqqtrain.models.weights.synthetic import SyntheticReader

CPU = torch.device("cpu")


@pytest.fixture(params=["safetensors", "synthetic"])
def source(request, checkpoint) -> WeightSource:
    if request.param == "safetensors":
        return SafetensorsReader(checkpoint)
    shapes = expected_shapes(build_meta(load_hf_config(checkpoint)))
    return SyntheticReader(shapes, torch.float32, CPU)


@pytest.mark.parametrize("rows", [[slice(0, 48)], [slice(3, 9), slice(40, 48)], [slice(5, 5)]])
def test_rows_of_a_tensor(source: WeightSource, rows):
    name = "model.layers.1.mlp.up_proj.weight"
    assert source.shape(name) == (48, 32)
    assert source.prefetch_depth >= 0
    whole = source.read(name)
    before = source.bytes_read
    part = source.read(name, rows)
    assert torch.equal(part, torch.cat([whole[r] for r in rows]))
    assert source.bytes_read - before == part.nbytes
