"""HQQLinear as an ordinary module, compared with nn.Linear on its dequantized weight."""

import copy
import io

import pytest
import torch
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear
from hqqtrain.quant.quantize import dequantize_weight, quantize_weight
from hqqtrain.quant.spec import QuantSpec

STORAGE = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
SPEC = QuantSpec(2, 32, 1, "least_squares", torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_of(spec: QuantSpec = SPEC, *, bias: bool = True, **options: object) -> HQQLinear:
    return HQQLinear.from_linear(nn.Linear(64, 96, bias=bias), spec, **options)


def dense_of(layer: HQQLinear) -> nn.Linear:
    """Return a frozen nn.Linear with the dequantized weight of the layer."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense = dense.to(layer.compute_dtype)
    dense.weight.data.copy_(layer.dequantize())
    if layer.bias is not None:
        dense.bias.data.copy_(layer.bias)
    return dense.requires_grad_(False)


def bits_of(layer: HQQLinear) -> dict[str, bytes]:
    packed = {name: getattr(layer, name).detach().cpu() for name in PACKED_PARAMETERS}
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in packed.items()}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_outputs_and_gradients_are_those_of_a_linear(nbits: int, axis: int) -> None:
    layer = layer_of(QuantSpec(nbits, 16, axis, "hqq", torch.float32))
    dense = dense_of(layer)
    x = torch.randn(2, 5, 64, requires_grad=True)
    grad = torch.randn(2, 5, 96)
    ours, theirs = layer(x), dense(x)
    torch.testing.assert_close(ours, theirs)
    (got,), (expected,) = (torch.autograd.grad(y, x, grad) for y in (ours, theirs))
    torch.testing.assert_close(got, expected)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("meta", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("storage", STORAGE)
def test_viewed_as_one_dtype_it_is_the_same_layer(storage: torch.dtype, meta: torch.dtype) -> None:
    layer = layer_of(QuantSpec(2, 32, 1, "least_squares", meta))
    before, x = bits_of(layer), torch.randn(3, 64, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    layer.view_packed_as(storage)
    assert {getattr(layer, name).dtype for name in PACKED_PARAMETERS} == {storage}
    assert bits_of(layer) == before
    found = layer(x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], gradient)
    assert torch.equal(layer.dequantize(), layer.half().float().dequantize(torch.float32))
    assert bits_of(layer) == before, "casting the module leaves packed bits alone"


@pytest.mark.parametrize("storage", STORAGE)
def test_storage_is_a_view_of_the_same_bits(storage: torch.dtype) -> None:
    linear = nn.Linear(64, 96)
    layer = HQQLinear.from_linear(linear, SPEC, storage_dtype=storage)
    plain = HQQLinear.from_linear(linear, SPEC)
    assert layer.W_q.dtype == storage
    assert bits_of(layer) == bits_of(plain)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), plain(x))
    expected = dequantize_weight(quantize_weight(linear.weight, SPEC), layer.layout, torch.float32)
    assert torch.equal(layer.dequantize(), expected)


@pytest.mark.parametrize("storage", STORAGE)
def test_casting_and_moving_never_touch_the_packed_bits(storage: torch.dtype) -> None:
    spec = QuantSpec(8, 64, 1, "rtn", torch.float32)
    layer = HQQLinear(64, 2048, True, spec, storage_dtype=storage)
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(2048, -1)
    layer.W_q.data.view(torch.uint8).copy_(patterns.view(torch.uint8))  # includes every NaN
    layer.scale.data.fill_(1 / 3)
    layer.zero.data.fill_(128.3)
    before, model = bits_of(layer), nn.Sequential(layer)
    for change in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.float().cpu(),
        copy.deepcopy,
    ):
        model = change(model)
        assert bits_of(model[0]) == before
        assert model[0].scale.dtype == model[0].zero.dtype == torch.float32
        assert model[0].W_q.dtype == storage
    state = model.state_dict()
    other = HQQLinear(64, 2048, True, spec, storage_dtype=storage)
    nn.Sequential(other).load_state_dict(state)
    assert bits_of(other) == before


def test_casting_changes_compute_dtype_and_bias() -> None:
    layer = layer_of()
    assert layer.compute_dtype == torch.float32
    layer.to(torch.bfloat16)
    assert layer.compute_dtype == layer.bias.dtype == layer.dequantize().dtype == torch.bfloat16
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), dense_of(layer)(x))
    layer.to("cpu")
    assert layer.compute_dtype == torch.bfloat16


def test_saved_and_loaded_by_torch() -> None:
    layer = layer_of(bias=False)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)  # trusted bytes; checks that the module pickles
    assert bits_of(again) == bits_of(layer)
    assert (again.layout, again.spec, again.bias) == (layer.layout, layer.spec, None)
    with pytest.raises(RuntimeError, match="W_q"):
        HQQLinear(64, 96, False, QuantSpec(4, 32, 1, "rtn", torch.bfloat16)).load_state_dict(
            layer.state_dict()
        )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_built_on_meta_then_loaded(axis: int, bias: bool) -> None:
    spec = QuantSpec(3, None, axis, "least_squares", torch.bfloat16)
    real = layer_of(spec, bias=bias)
    with torch.device("meta"):
        empty = HQQLinear.from_linear(nn.Linear(64, 96, bias=bias), spec)
    assert all(p.is_meta for p in empty.parameters())
    assert empty(torch.empty(2, 64, device="meta")).shape == (2, 96)
    shapes = {n: (p.shape, p.dtype) for n, p in real.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == shapes
    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(real.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(loaded(x), real(x))
    assert loaded.compute_dtype == real.compute_dtype


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_compiles_as_one_graph_with_any_batch(storage: torch.dtype) -> None:
    model = nn.Sequential(layer_of(storage_dtype=storage), nn.ReLU(), nn.Linear(96, 4))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 64), (9, 64), (2, 5, 64)):
        x = torch.randn(shape, requires_grad=True)
        torch.testing.assert_close(compiled(x), model(x))
        got, expected = (torch.autograd.grad(m(x).sum(), x) for m in (compiled, model))
        torch.testing.assert_close(got, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


def test_dtypes_under_autocast() -> None:
    layer = layer_of()
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), dense_of(layer)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_activation_checkpointing_recomputes_it() -> None:
    layer = layer_of()
    x = torch.randn(3, 64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(layer(x).sum(), x)[0])


def test_errors_name_the_layer() -> None:
    with pytest.raises(UserError, match=r"group_size=48.*in_features=64 of model\.q"):
        HQQLinear(64, 96, False, QuantSpec(4, 48, 1, "rtn", torch.float32), name="model.q")
    linear = nn.Linear(64, 96)
    linear.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"model\.q.*row 3"):
        HQQLinear.from_linear(linear, SPEC, name="model.q")
    with pytest.raises(UserError, match="from_linear: spec is a dict; it must be a QuantSpec"):
        HQQLinear.from_linear(linear, {"nbits": 4})


def test_repr_shows_the_quantization_settings() -> None:
    assert "nbits=2, group_size=32, axis=1" in repr(layer_of())
    assert not hasattr(layer_of(), "weight")
