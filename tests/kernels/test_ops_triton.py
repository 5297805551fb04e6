"""The operators with Triton kernels: in the interpreter on a CPU, or on a GPU."""

from collections.abc import Callable

import pytest
import torch
from kernel_weights import DEVICE, GPU, packed
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hqqtrain_kernels as kernels
from hqqtrain_kernels import Layout, matmul, reference

pytest.importorskip("triton", reason="Triton is not installed here")
from hqqtrain_kernels import linear_triton

pytestmark = pytest.mark.usefixtures("triton_backend", "small_layers_too")

DTYPE = torch.bfloat16 if GPU else torch.float16  # the interpreter does not round bf16

FUSED = Layout(40, 128, 4, 64, 1)
"""Few rows of x are multiplied with its packed weight."""

DENSE = Layout(40, 128, 3, 8, 0)
"""Its weight is always dequantized."""


def dense(parts: tuple[Tensor, ...], layout: Layout) -> Tensor:
    return reference.dequantize(*parts, layout, torch.float32).double()


def operator_arguments(layout: Layout) -> tuple[int, ...]:
    return layout.in_features, layout.nbits, layout.group_size, layout.axis


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype = DTYPE) -> None:
    """Check up to the error of rounding the weight and the result to `dtype`."""
    error = (got.double() - expected).norm()
    assert error <= 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("layout", [FUSED, DENSE], ids=["fused", "dense"])
def test_opcheck_of_linear(layout: Layout) -> None:
    x = torch.randn(2, 3, layout.in_features, device=DEVICE).to(DTYPE).requires_grad_()
    bias = torch.randn(layout.out_features, device=DEVICE).to(DTYPE).requires_grad_()
    torch.library.opcheck(
        torch.ops.hqqtrain.linear.default,
        (x, *packed(layout), bias, *operator_arguments(layout), DTYPE),
    )


def test_opcheck_of_dequantize() -> None:
    parts = *packed(DENSE), *operator_arguments(DENSE)
    out = torch.empty(40, 128, device=DEVICE, dtype=DTYPE)
    torch.library.opcheck(torch.ops.hqqtrain.dequantize.default, (*parts, DTYPE))
    torch.library.opcheck(torch.ops.hqqtrain.dequantize_into.default, (*parts, out))


@pytest.mark.parametrize("rows", [1, 7, 150])
@pytest.mark.parametrize("layout", [FUSED, DENSE], ids=["fused", "dense"])
def test_values_and_gradients(layout: Layout, rows: int) -> None:
    parts = packed(layout)
    W = dense(parts, layout)
    x = torch.randn(rows, layout.in_features, device=DEVICE).to(DTYPE).requires_grad_()
    bias = torch.randn(layout.out_features, device=DEVICE).to(DTYPE).requires_grad_()
    y = kernels.linear(x, *parts, bias, layout, DTYPE)
    assert y.dtype == DTYPE
    assert_near(y, F.linear(x.double(), W, bias.double()))
    transposed = torch.randn(layout.out_features, rows, device=DEVICE).to(DTYPE).T
    for grad in (torch.ones((), dtype=DTYPE, device=DEVICE).expand(y.shape), transposed):
        grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad, retain_graph=True)
        assert_near(grad_x, grad.double() @ W)
        assert_near(grad_bias, grad.double().sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_dequantized(dtype: torch.dtype) -> None:
    parts = packed(FUSED)
    x = torch.randn(3, 128, device=DEVICE, dtype=dtype, requires_grad=True)
    y = kernels.linear(x, *parts, None, FUSED)
    torch.testing.assert_close(y, F.linear(x, dense(parts, FUSED).to(dtype)))
    assert y.dtype == dtype


def test_gradients_in_fp64() -> None:
    parts = packed(DENSE)
    x = torch.randn(2, 128, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = torch.randn(40, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return kernels.linear(x, *parts, bias, DENSE)

    assert torch.autograd.gradcheck(layer, (x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (x, bias), fast_mode=True)


@pytest.mark.parametrize("x_needs_grad", [True, False])
@pytest.mark.parametrize("layout", [FUSED, DENSE], ids=["fused", "dense"])
def test_saves_nothing_but_the_packed_weight(layout: Layout, x_needs_grad: bool) -> None:
    parts = packed(layout)
    kept: list[Tensor] = []
    x = torch.randn(7, 128, device=DEVICE, dtype=DTYPE).requires_grad_(x_needs_grad)
    bias = torch.randn(40, device=DEVICE, dtype=DTYPE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.linear(x, *parts, bias, layout, DTYPE)
    expected = {t.data_ptr() for t in parts} if x_needs_grad else set()
    assert {t.data_ptr() for t in kept} == expected


@pytest.mark.parametrize("layout", [FUSED, DENSE], ids=["fused", "dense"])
def test_activation_checkpointing_changes_no_bit(layout: Layout) -> None:
    parts = packed(layout)
    x = torch.randn(4, 128, device=DEVICE, dtype=DTYPE, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return kernels.linear(x, *parts, None, layout, DTYPE).square()

    (expected,) = torch.autograd.grad(layer(x).float().sum(), x)
    for reentrant in (False, True):
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).float().sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("layout", [FUSED, DENSE], ids=["fused", "dense"])
def test_autocast(layout: Layout) -> None:
    parts = packed(layout)
    x = torch.randn(4, 128, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, DTYPE):
        y = kernels.linear(x, *parts, None, layout)
    assert y.dtype == DTYPE
    assert_near(y, F.linear(x.to(DTYPE).double(), dense(parts, layout)))
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32
    assert_near(grad, torch.ones_like(y).double() @ dense(parts, layout))


def count_graphs(backend: str, graphs: list) -> Callable:
    def compiler(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return compiler


INDUCTOR = pytest.param("inductor", marks=pytest.mark.gpu)  # on a CPU in test_ops.py


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_compiles_to_one_graph_for_every_batch_size(backend: str) -> None:
    parts, graphs = packed(FUSED), []
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: kernels.linear(x, *parts, None, FUSED, DTYPE).relu(),
        fullgraph=True, dynamic=True, backend=count_graphs(backend, graphs),
    )  # fmt: skip
    W = dense(parts, FUSED)
    for rows in (3, 5, 130):  # fused, and not; 2 is a size of `scale` too
        x = torch.randn(rows, 128, device=DEVICE, dtype=DTYPE, requires_grad=True)
        y = compiled(x)
        expected = F.linear(x.double(), W)
        assert_near(y, expected.relu())
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert_near(grad, (y > 0).double() @ W)
    assert len(graphs) == 1


def test_dequantizing_into_a_part_compiles() -> None:
    parts = packed(FUSED)

    def both(buffer: Tensor) -> Tensor:
        kernels.dequantize(*parts, FUSED, out=buffer[:40])
        kernels.dequantize(*parts, FUSED, out=buffer[40:])
        return buffer.sum(1)

    torch._dynamo.reset()
    buffer = torch.zeros(80, 128, device=DEVICE)
    sums = torch.compile(both, fullgraph=True, backend="aot_eager")(buffer)
    expected = dense(parts, FUSED).float()
    assert torch.equal(buffer, torch.cat([expected, expected]))
    torch.testing.assert_close(sums, buffer.sum(1))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 200])
def test_cuda_graphs(rows: int) -> None:
    parts = packed(FUSED)
    x = torch.randn(rows, 128, device=DEVICE, dtype=DTYPE, requires_grad=True)

    def step() -> tuple[Tensor, Tensor]:
        y = kernels.linear(x, *parts, None, FUSED, DTYPE)
        return y, torch.autograd.grad(y.float().sum(), x)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [FUSED, DENSE], ids=["fused", "dense"])
def test_runs_on_the_current_stream(layout: Layout) -> None:
    """On another stream it would read x before x is written: the side stream sleeps first."""
    parts = packed(layout)
    x = torch.zeros(4, 128, device=DEVICE, dtype=DTYPE)
    later = torch.randn_like(x)
    expected = kernels.linear(later, *parts, None, layout, DTYPE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        x.copy_(later)
        y = kernels.linear(x, *parts, None, layout, DTYPE)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", [FUSED, DENSE], ids=["fused", "dense"])
def test_a_device_that_is_not_the_current_one(layout: Layout) -> None:
    parts = packed(layout)
    x = torch.randn(4, 128, device=DEVICE, dtype=DTYPE)
    expected = kernels.linear(x, *parts, None, layout, DTYPE)
    moved = [t.to("cuda:1") for t in parts]
    y = kernels.linear(x.to("cuda:1"), *moved, None, layout, DTYPE)
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.to(DEVICE), expected)


def test_the_operator_itself_keeps_the_dtype_of_x() -> None:
    parts = packed(DENSE)
    x = torch.randn(2, 128, device=DEVICE)
    with torch.autocast(DEVICE.type, DTYPE):
        y = torch.ops.hqqtrain.linear(x, *parts, None, *operator_arguments(DENSE), torch.float32)
    assert y.dtype == torch.float32


def test_the_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, with which these tests compare, must not be what computes."""
    launch, launched = linear_triton.launch, []

    def record(layout: Layout, **kwargs: object) -> Tensor:
        launched.append(layout)
        return launch(layout=layout, **kwargs)

    monkeypatch.setattr(linear_triton, "launch", record)
    monkeypatch.setattr(matmul.reference, "dequantize", None)
    for layout in (FUSED, DENSE):
        x = torch.randn(2, 128, device=DEVICE, dtype=DTYPE)
        kernels.linear(x, *packed(layout), None, layout)
    assert launched == [FUSED]


def test_arguments_that_do_not_fit_together_are_refused() -> None:
    W_q, scale, zero = packed(FUSED)
    x = torch.randn(2, 128, device=DEVICE, dtype=DTYPE)

    def linear(x: Tensor = x, W_q: Tensor = W_q, scale: Tensor = scale,
               bias: Tensor | None = None) -> Tensor:  # fmt: skip
        return kernels.linear(x, W_q, scale, zero, bias, FUSED)

    for wide in (x.repeat(1, 2), x[:, :64], x.repeat(100, 2)):
        with pytest.raises(RuntimeError, match="shape"):
            linear(x=wide)
    with pytest.raises(RuntimeError, match="size"):
        linear(bias=torch.zeros(39, device=DEVICE, dtype=DTYPE))
    for wrong in ({"scale": scale[:, :1]}, {"W_q": W_q[:, :32]}, {"scale": scale.T.contiguous().T}):
        with pytest.raises(ValueError, match="needs W_q"):
            linear(**wrong)
