"""The products of linears with LoRA and their gradients, compared with autograd in fp64."""

import pytest
import torch
from torch import Tensor

from hqqtrain.nn.lora_blocks import products

M, K = 5, 12
SIZES = {"one": [(7, 3)], "three": [(7, 3), (4, 1), (9, 2)]}
SCALINGS = {"alike": 0.5, "different": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_products(sizes: list[tuple[int, int]], scaling: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def parameters(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).float()  # exact in both dtypes

    scalings = tuple(scaling or 0.5 + i for i in range(len(sizes)))
    x, g = parameters(M, K).to(dtype), parameters(M, sum(N for N, _ in sizes)).to(dtype)
    A, B = [parameters(r, K) for _, r in sizes], [parameters(N, r) for N, r in sizes]
    weights = [parameters(N, K) for N, _ in sizes]
    biases = [parameters(N) if i != 1 else None for i, (N, _) in enumerate(sizes)]

    exact_x, *exact_AB = (t.double().requires_grad_() for t in (x, *A, *B))
    exact_A, exact_B = exact_AB[: len(A)], exact_AB[len(A) :]
    exact_y = torch.cat([
        exact_x @ W.double().t() + (0 if b is None else b.double()) + s * (exact_x @ a.t()) @ B_.t()
        for W, b, s, a, B_ in zip(weights, biases, scalings, exact_A, exact_B, strict=True)
    ], dim=1)  # fmt: skip
    exact = torch.autograd.grad(exact_y, [exact_x, *exact_A, *exact_B], g.double())

    adapters = products.cast_adapters(A, B, scalings, dtype)
    W = products.dense_weight(weights, dtype)
    U = products.project(x, adapters)
    y = products.joined_outputs(x, U, W, biases, adapters)
    gs = products.split_outputs(g, adapters)
    V = products.project_gradients(gs, adapters)
    grad_A, grad_B = products.adapter_gradients(gs, x, U, V, adapters, torch.float32)
    grad_x = products.input_gradient(gs, V, W, adapters)
    ys = torch.cat(products.outputs(x, U, W, biases, adapters), dim=1)
    joined_grad_x = products.input_gradient([g], V, W, adapters)
    exact = [exact_y.detach(), exact[0], exact_y.detach(), *exact]
    got = [ys, joined_grad_x, y, grad_x, *grad_A, *grad_B]
    eps = 1e-5 if dtype == torch.float32 else 0.03
    for value, expected in zip(got, exact, strict=True):
        assert (value.double() - expected).norm() <= eps * expected.norm()
    assert y.dtype == grad_x.dtype == dtype
    assert {grad.dtype for grad in (*grad_A, *grad_B)} == {torch.float32}


def test_adapters_in_the_dtype_of_the_products_are_not_copied() -> None:
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    adapters = products.cast_adapters([A], [B], (1.0,), torch.float32)
    assert adapters.A is A
    assert adapters.B[0] is B


def test_a_dense_weight_in_the_dtype_is_not_copied() -> None:
    W = torch.ones(4, 3)
    assert products.dense_weight([W], torch.float32) is W
