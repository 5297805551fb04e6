"""humming computes our weights, with an adapter and compiled; it needs a GPU and the package."""

from functools import partial
from importlib import util

import pytest
from backend_products import check_model, check_products, make_layer
from exports import WIDE

from hqqtrain.inference.backends.humming import HummingBackend

BACKEND = HummingBackend()
CASES = [(dtype, nbits) for dtype, bits in BACKEND.limits.nbits.items() for nbits in bits]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(util.find_spec("humming") is None, reason="humming is not installed here"),
]


@pytest.mark.parametrize(("dtype", "nbits"), CASES)
def test_products(dtype, nbits):
    check_products(BACKEND, make_layer(nbits, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_group_sizes(group_size):
    layer = make_layer(4, group_size, rows=256, columns=1024, device="cuda", bias=False)
    check_products(BACKEND, layer)


@pytest.mark.parametrize("nbits", [4, 2])
def test_a_model_with_an_adapter(make_trained, nbits):
    make = partial(make_trained, sizes=WIDE | {"hidden_size": 256, "intermediate_size": 256})
    check_model("humming", make, nbits, device="cuda", compiler="inductor")
