"""The operators compared with F.linear on the dequantized weight: values, gradients, compiling."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import hqqtrain_kernels as kernels
from hqqtrain_kernels import Layout

LAYOUTS = [Layout(48, 64, nbits, 16, axis) for nbits in (8, 4, 3, 2, 1) for axis in (0, 1)]
AWKWARD = [
    Layout(9, 7, 3, 7, 1), Layout(9, 7, 3, 9, 0), Layout(6, 10, 1, 2, 0), Layout(1, 1, 2, 1, 1)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed(layout: Layout, meta_dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    codes = torch.randint(0, 1 << layout.nbits, (layout.units, layout.unit_codes)).to(torch.uint8)
    scale = torch.rand(layout.units, layout.groups, dtype=torch.float32) * 0.1
    zero = torch.rand(layout.units, layout.groups, dtype=torch.float32) * (1 << layout.nbits)
    return kernels.pack(codes, layout.nbits), scale.to(meta_dtype), zero.to(meta_dtype)


def naive_weight(W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout) -> Tensor:
    codes = kernels.unpack(W_q, layout.nbits, layout.unit_codes)
    groups = codes.view(layout.units, layout.groups, layout.group_size).float()
    W = (groups - zero.float()[..., None]) * scale.float()[..., None]
    if layout.axis == 1:
        return W.reshape(layout.out_features, layout.in_features)
    out = torch.empty(layout.out_features, layout.in_features)
    for r in range(layout.units):
        out[r :: layout.units] = W[r].T
    return out


def operator_arguments(layout: Layout, dtype: torch.dtype = torch.float32) -> tuple:
    return layout.in_features, layout.nbits, layout.group_size, layout.axis, dtype


@pytest.mark.parametrize("layout", LAYOUTS + AWKWARD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_rounds_once(layout: Layout, dtype: torch.dtype) -> None:
    parts = packed(layout, torch.bfloat16)
    expected = naive_weight(*parts, layout).to(dtype)
    assert torch.equal(kernels.dequantize(*parts, layout, dtype), expected)
    viewed = parts[0].view(torch.float32)
    assert torch.equal(kernels.dequantize(viewed, *parts[1:], layout, dtype), expected)


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[3]], ids=str)
def test_dequantizes_into_a_part_of_a_buffer(layout: Layout) -> None:
    parts = packed(layout)
    buffer = torch.full((50, 66), 7.0)
    out = kernels.dequantize(*parts, layout, out=buffer[1:-1, 1:-1])
    assert torch.equal(out, naive_weight(*parts, layout))
    assert out.data_ptr() == buffer[1:, 1:].data_ptr()
    out.fill_(7)
    assert bool((buffer == 7).all())  # nothing was written around it


def test_refuses_a_buffer_of_another_shape() -> None:
    parts = packed(LAYOUTS[2])
    for wrong in (torch.empty(48, 63), torch.empty(64, 48).T, torch.empty(48, 64).half()):
        with pytest.raises(ValueError, match="needed is"):
            kernels.dequantize(*parts, LAYOUTS[2], torch.float32, out=wrong)
    with pytest.raises(ValueError, match="dtype=None"):
        kernels.dequantize(*parts, LAYOUTS[2])


def shapes_of_x(k: int) -> list[Callable[[], Tensor]]:
    return [
        lambda: torch.randn(k),
        lambda: torch.randn(5, k),
        lambda: torch.randn(2, 3, k),
        lambda: torch.randn(0, k),
        lambda: torch.randn(2, 0, k),
        lambda: torch.randn(k, 5).T,
        lambda: torch.randn(5, 2 * k)[:, ::2],
        lambda: torch.randn(1, 3, k).expand(4, 3, k),
        lambda: torch.randn(3, 2, k).transpose(0, 1),
    ]


@pytest.mark.parametrize("case", range(9))
@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[5]], ids=str)
def test_values_and_gradients_are_those_of_a_linear(layout: Layout, case: int) -> None:
    parts = packed(layout)
    W = naive_weight(*parts, layout)
    x = shapes_of_x(layout.in_features)[case]().requires_grad_()
    bias = torch.randn(layout.out_features, requires_grad=True)
    ours = kernels.linear(x, *parts, bias, layout)
    theirs = F.linear(x, W, bias)
    torch.testing.assert_close(ours, theirs)
    transposed = torch.randn(theirs.shape[::-1]).permute(*range(theirs.dim() - 1, -1, -1))
    expanded = torch.ones(()).expand(theirs.shape)  # as .sum() makes it
    for grad in (expanded, transposed):
        got = torch.autograd.grad(ours, (x, bias), grad, retain_graph=True)
        expected = torch.autograd.grad(theirs, (x, bias), grad, retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_gradcheck_in_fp64() -> None:
    layout = LAYOUTS[4]
    parts = packed(layout)
    x = torch.randn(3, layout.in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(layout.out_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: kernels.linear(x, *parts, b, layout), (x, bias))


def test_backward_keeps_the_packed_weight_and_no_activation() -> None:
    layout = LAYOUTS[2]
    parts = packed(layout)
    kept: list[Tensor] = []
    x = torch.randn(7, layout.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.linear(x, *parts, torch.randn(layout.out_features), layout)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in parts}


@pytest.mark.parametrize("frozen", [1, 2])
def test_refuses_to_train_scale_or_zero_silently(frozen: int) -> None:
    layout = LAYOUTS[0]
    parts = packed(layout)
    parts[frozen].requires_grad_()
    with pytest.raises(NotImplementedError, match="frozen"):
        kernels.linear(torch.randn(2, layout.in_features, requires_grad=True), *parts, None, layout)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_multiplies_in_the_dtype_of_x(dtype: torch.dtype, compute: torch.dtype) -> None:
    layout = LAYOUTS[3]
    parts = packed(layout)
    W = naive_weight(*parts, layout).to(compute).to(dtype)
    x = torch.randn(4, layout.in_features, dtype=dtype, requires_grad=True)
    y = kernels.linear(x, *parts, None, layout, compute)
    torch.testing.assert_close(y, F.linear(x, W), rtol=0, atol=0)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_meta_tensors_have_shapes_under_autocast_too() -> None:
    layout = LAYOUTS[2]
    parts = [part.to("meta") for part in packed(layout)]
    x = torch.empty(4, layout.in_features, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(x, *parts, None, layout).shape == (4, layout.out_features)


def test_autocast_behaves_as_with_a_linear() -> None:
    layout = LAYOUTS[2]
    parts = packed(layout)
    W = naive_weight(*parts, layout)
    x = torch.randn(4, layout.in_features, requires_grad=True)
    bias = torch.randn(layout.out_features, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = kernels.linear(x, *parts, bias, layout), F.linear(x, W, bias)
        bare = torch.ops.hqqtrain.linear(x, *parts, None, *operator_arguments(layout))
    assert bare.dtype == torch.float32  # the operator itself returns the dtype of x
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    got, expected = (torch.autograd.grad(y.float().sum(), (x, bias)) for y in (ours, theirs))
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_for_every_batch_size(backend: str) -> None:
    layout = LAYOUTS[2]
    parts = packed(layout)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: kernels.linear(x, *parts, None, layout),  # inductor has no code to compile
        fullgraph=True, dynamic=True, backend=count,
    )  # fmt: skip
    W = naive_weight(*parts, layout)
    for rows in (2, 5, 31):
        x = torch.randn(rows, layout.in_features, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, F.linear(x, W))
        (got,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(got, torch.autograd.grad(F.linear(x, W).sum(), x)[0])
    assert len(graphs) == 1


def test_tracers_and_transforms_see_one_operator() -> None:
    layout = LAYOUTS[2]
    parts = packed(layout)
    x = torch.randn(4, layout.in_features)

    def layer(x: Tensor) -> Tensor:
        return kernels.linear(x, *parts, None, layout)

    expected = layer(x)
    graph = make_fx(layer)(x)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.hqqtrain.linear.default]
    torch.testing.assert_close(graph(x), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(4, layout.in_features)).shape == expected.shape
