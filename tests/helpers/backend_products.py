"""Compare the products of a backend for inference with those of the exact weights, in fp64."""

from collections.abc import Callable

import torch
from exports import TOKENS
from torch import Tensor, nn

from hqqtrain.inference.backends.base import InferenceBackend, RepackedLinear
from hqqtrain.inference.prepare import prepare_for_inference
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import cast_adapters
from hqqtrain.quant.spec import QuantSpec

EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make_layer(
    nbits: int, group_size: int = 64, *, axis: int = 1, rows: int = 384, columns: int = 576,
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu", bias: bool = True,
) -> HQQLinear:  # fmt: skip
    """Return a quantized random layer."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias, device=device, dtype=dtype)
    meta_dtype = torch.float32 if nbits == 8 else torch.bfloat16
    return HQQLinear.from_linear(linear, QuantSpec(nbits, group_size, axis, "rtn", meta_dtype))


def relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


def check_products(backend: InferenceBackend, layer: HQQLinear) -> None:
    """Check products of 1, 7 and 512 rows; the weights may be rounded twice, and the result.

    humming rounds the zero of 8 bits, too.
    """
    assert backend.refusal(layer) is None
    repacked = backend.repack(layer)
    weight = layer.dequantize(torch.float32).double()
    allowed = (3 if layer.spec.nbits == 8 else 2) * EPSILON[layer.compute_dtype]
    for rows in (1, 7, 512):
        x = torch.randn(rows, 2, layer.in_features, device=weight.device)[:, 1]
        x = x.to(layer.compute_dtype)  # its rows are not adjacent
        expected = x.double() @ weight.t()
        if layer.bias is not None:
            expected += layer.bias.double()
        y = repacked(x)
        assert (y.dtype, y.shape) == (x.dtype, expected.shape)
        assert relative_error(y, expected) < allowed, rows


@torch.no_grad()
def check_model(name: str, make_wide: Callable, nbits: int, *, device: str, compiler: str) -> None:
    """Check logits with and without the adapter, eager and compiled to a single graph."""
    model = make_wide(nbits=nbits, group_size=32).model.to(device, torch.bfloat16)
    cast_adapters(model, torch.bfloat16)
    tokens = TOKENS.to(device)
    before = model(tokens).logits
    with model.disable_adapter():
        base = model(tokens).logits
    prepare_for_inference(model, name)
    assert sum(isinstance(module, RepackedLinear) for module in model.modules()) == 8
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for run in (model, compiled):
        assert relative_error(run(tokens).logits, before) < 0.03
        with model.disable_adapter():
            assert relative_error(run(tokens).logits, base) < 0.03
    assert relative_error(base, before) > 0.1
