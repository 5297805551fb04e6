"""gemlite computes our weights, with an adapter and compiled, on a GPU with the package."""

from functools import partial
from importlib import util

import pytest
import torch
from backend_products import check_model, check_products, make_layer
from exports import WIDE

from hqqtrain.inference.backends.gemlite import GemliteBackend

BACKEND = GemliteBackend()
CASES = [(dtype, nbits) for dtype, bits in BACKEND.limits.nbits.items() for nbits in bits]

WITH_GEMLITE = [
    pytest.mark.gpu,
    pytest.mark.skipif(util.find_spec("gemlite") is None, reason="gemlite is not installed here"),
]


def with_gemlite(test):
    for mark in WITH_GEMLITE:
        test = mark(test)
    return test


@pytest.mark.parametrize(("group_size", "columns"), [(64, 576), (64, 1536), (128, 1024)])
def test_rows_with_a_part_of_a_split_are_refused(group_size, columns):
    refusal = BACKEND.refusal(make_layer(4, group_size, rows=32, columns=columns))
    assert refusal == f"groups of {group_size} in rows of {columns}"


def test_whole_splits_are_computed():
    assert BACKEND.refusal(make_layer(4, rows=32, columns=1024)) is None


def test_the_compiler_knows_the_dtype_of_the_product():
    x, codes = (
        torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((2, 8), (4, 3))
    )
    y = torch.ops.hqqtrain.gemlite_product(x, [codes], [0])
    assert (y.shape, y.dtype) == ((2, 3), torch.float32)


@with_gemlite
@pytest.mark.parametrize(("dtype", "nbits"), CASES)
def test_products(dtype, nbits):
    check_products(BACKEND, make_layer(nbits, columns=2048, dtype=dtype, device="cuda"))


@with_gemlite
@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_group_sizes(group_size):
    layer = make_layer(4, group_size, columns=16 * group_size, device="cuda", bias=False)
    check_products(BACKEND, layer)


@with_gemlite
@pytest.mark.parametrize("nbits", [4, 2])
def test_a_model_with_an_adapter(make_trained, nbits):
    make = partial(make_trained, sizes=WIDE | {"hidden_size": 512, "intermediate_size": 512})
    check_model("gemlite", make, nbits, device="cuda", compiler="inductor")
