"""Layers are given to a backend that can compute them, and what it cannot do is said."""

import logging

import pytest
import torch
from backend_products import make_layer, relative_error
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.quant import INFERENCE_BACKENDS
from hqqtrain.inference.backends.base import RepackedLinear
from hqqtrain.inference.backends.registry import (
    BACKENDS,
    find_backend,
    repack_linears,
)
from hqqtrain.inference.backends.torchao import TorchaoBackend
from hqqtrain.nn.hqq_linear import HQQLinear

TORCHAO = BACKENDS["torchao"]


def test_the_command_line_knows_the_names():
    assert tuple(BACKENDS) == INFERENCE_BACKENDS


@pytest.mark.parametrize(
    ("name", "found"),
    [("auto", None), ("default", None), ("torchao", TORCHAO), ("torchao_int4", TORCHAO)],
)
def test_a_name_of_ours_or_of_hqq(name, found):
    assert find_backend(name) is found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("marlin", "backend=marlin: hqq 0.2.8 has no code for it; humming computes the same"),
        ("bitblas", "backend=bitblas: it has had no release since .*; humming computes"),
        ("torch", r"set_backend\('torch'\) chooses it, for the whole process"),
        ("cutlass", "backend=cutlass: Allowed are auto, gemlite, humming, torchao"),
    ],
)
def test_other_names(name, message):
    with pytest.raises(UserError, match=message):
        find_backend(name)


def test_layers_that_it_can_compute(caplog):
    model = nn.ModuleList([
        make_layer(4), make_layer(3), make_layer(4, axis=0), make_layer(4, 16),
        make_layer(4, rows=24, bias=False), make_layer(2), nn.Linear(2, 2),
    ])  # fmt: skip
    before = model[0](torch.ones(1, 576))
    with caplog.at_level(logging.INFO, "hqqtrain"):
        repack_linears(model, TORCHAO)
    assert [type(layer) for layer in model[1:6]] == [HQQLinear] * 5
    assert isinstance(model[0], RepackedLinear)
    assert relative_error(model[0](torch.ones(1, 576)), before) < 0.01
    assert caplog.messages == [
        "backend=torchao: computes 1 of 6 quantized layers; hqqtrain's own kernels compute the "
        "others: 1 with 3 bits in bfloat16, 1 with axis 0, 1 with groups of 16, 1 with 24 x 576 "
        "weights, 1 with 2 bits in bfloat16"
    ]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(2, 2), "backend=torchao: the model has no quantized layers"),
        (make_layer(2), "none of the 1 quantized layers: 1 with 2 bits in bfloat16. Use auto"),
        (make_layer(4, dtype=torch.float16), "computes in bfloat16, and the model is in float16"),
    ],
)
def test_none_that_it_can_compute(layer, message):
    with pytest.raises(UserError, match=message):
        repack_linears(nn.Sequential(layer), TORCHAO)


class Failing(TorchaoBackend):
    """A backend whose package has changed: it fails, or it computes something else."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def repack(self, layer: HQQLinear) -> RepackedLinear:
        if self.error:
            raise self.error
        repacked = super().repack(layer)
        repacked.get_buffer("scale_and_shift").mul_(1.1)
        return repacked


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AttributeError("no pack"), "failed at 0 with AttributeError: no pack. Use auto"),
        (None, "computes 0 with an error of 0.1, so its version does not fit"),
    ],
)
def test_a_package_that_fails(error, message):
    with pytest.raises(UserError, match=message):
        repack_linears(nn.Sequential(make_layer(4)), Failing(error))
