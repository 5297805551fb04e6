r"""The products of linears with LoRA that have the same input, and of their gradients.

Linear i has a frozen weight W_i [N_i, K], a bias b_i, the matrices A_i [r_i, K] and B_i [N_i, r_i],
and the scaling s_i. All have the input x [M, K]:

    forward:   U   = s (x A^T)              [M, r]     all A_i side by side
               y_i = U_i B_i^T + b_i        [M, N_i]   written to its columns of y
               y  += x W^T                  [M, N]     all W_i side by side
    backward:  V_i = s_i (g_i B_i)          [M, r_i]   g is the gradient of y
               grad_x   = V A + g W         [M, K]
               grad_A   = V^T x             [r, K]
               grad_B_i = g_i^T U_i         [N_i, r_i]

The large products add to the small ones in place, and the scaling is a factor of a product, so no
step reads or writes y only to scale or to add.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqqtrain.compat import copy_tensors
from hqqtrain_kernels import matmul
from hqqtrain_kernels.matmul import PackedWeight

Weight = PackedWeight | Tensor
"""A frozen weight [out_features, in_features]: packed, or a dense tensor of any float dtype."""


class Adapters(NamedTuple):
    """The LoRA matrices of a block, in the dtype of the products.

    Attributes:
        A: All A_i, one below the other [r, K].
        B: The matrices B_i [N_i, r_i].
        scalings: The scalings s_i.
    """

    A: Tensor
    B: tuple[Tensor, ...]
    scalings: tuple[float, ...]

    def columns_of_U(self) -> list[slice]:
        """Return the columns of U and V that belong to each linear."""
        return _slices([B.shape[1] for B in self.B])

    def columns_of_y(self) -> list[slice]:
        """Return the columns of y and g that belong to each linear."""
        return _slices([B.shape[0] for B in self.B])


def cast_adapters(
    A: Sequence[Tensor], B: Sequence[Tensor], scalings: tuple[float, ...], dtype: torch.dtype
) -> Adapters:
    """Return the matrices A_i [r_i, K] and B_i [N_i, r_i] in `dtype`, the A_i in one tensor."""
    copies: list[Tensor] = []
    sources: list[Tensor] = []
    stacked, cast_B = A[0], list(B)
    if len(A) > 1 or A[0].dtype != dtype:
        stacked = A[0].new_empty(sum(len(each) for each in A), A[0].shape[1], dtype=dtype)
        copies += stacked.split([len(each) for each in A])
        sources += A
    for i, each in enumerate(B):
        if each.dtype != dtype:
            cast_B[i] = torch.empty_like(each, dtype=dtype)
            copies.append(cast_B[i])
            sources.append(each)
    if copies:
        copy_tensors(copies, sources)
    return Adapters(stacked, tuple(cast_B), scalings)


def dense_weight(weights: Sequence[Weight], dtype: torch.dtype) -> Tensor:
    """Return the weights [N_i, K], one below the other [N, K], in `dtype`.

    PyTorch's allocator gives the next block the same memory, per stream; so a buffer of our own
    would save nothing.
    """
    if len(weights) == 1 and isinstance(weights[0], Tensor):
        return weights[0].to(dtype)
    first = weights[0]
    K = first.shape[1] if isinstance(first, Tensor) else first.params.in_features
    heights = [_out_features(weight) for weight in weights]
    device = first.device if isinstance(first, Tensor) else first.W_q.device
    W = torch.empty(sum(heights), K, dtype=dtype, device=device)
    for weight, rows in zip(weights, W.split(heights), strict=True):
        _write_dense(weight, rows)
    return W


def project(x: Tensor, adapters: Adapters) -> Tensor:
    """Compute U = s (x A^T) [M, r] from x [M, K]."""
    scalings = adapters.scalings
    alike = len(set(scalings)) == 1
    U = x.new_empty(len(x), len(adapters.A))
    torch.addmm(U, x, adapters.A.t(), beta=0, alpha=scalings[0] if alike else 1, out=U)
    if not alike:
        for columns, scaling in zip(adapters.columns_of_U(), scalings, strict=True):
            U[:, columns].mul_(scaling)
    return U


def forward(
    x: Tensor, U: Tensor, W: Tensor, biases: Sequence[Tensor | None], adapters: Adapters
) -> Tensor:
    """Compute y [M, N].

    Args:
        x: The input [M, K].
        U: s (x A^T) [M, r].
        W: All weights [N, K].
        biases: The bias [N_i] of each linear, or None.
        adapters: The LoRA matrices.
    """
    y = x.new_empty(len(x), len(W))
    slices = zip(adapters.columns_of_y(), adapters.columns_of_U(), strict=True)
    for (out, rank), B, bias in zip(slices, adapters.B, biases, strict=True):
        if bias is None:
            torch.mm(U[:, rank], B.t(), out=y[:, out])
        else:
            torch.addmm(bias.to(y.dtype), U[:, rank], B.t(), out=y[:, out])
    return torch.addmm(y, x, W.t(), out=y)


def project_gradient(g: Tensor, adapters: Adapters) -> Tensor:
    """Compute V [M, r], the columns V_i = s_i (g_i B_i), from g [M, N]."""
    V = g.new_empty(len(g), len(adapters.A))
    slices = zip(adapters.columns_of_y(), adapters.columns_of_U(), strict=True)
    for (out, rank), B, scaling in zip(slices, adapters.B, adapters.scalings, strict=True):
        V_i = V[:, rank]
        torch.addmm(V_i, g[:, out], B, beta=0, alpha=scaling, out=V_i)
    return V


def input_gradient(g: Tensor, V: Tensor, W: Tensor, adapters: Adapters) -> Tensor:
    """Compute grad_x = V A + g W [M, K]."""
    grad_x = torch.mm(V, adapters.A)
    return torch.addmm(grad_x, g, W, out=grad_x)


def adapter_gradients(
    g: Tensor, x: Tensor, U: Tensor, V: Tensor, adapters: Adapters, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute grad_A_i [r_i, K] and grad_B_i [N_i, r_i] of every linear, in `dtype`."""
    ranks = [B.shape[1] for B in adapters.B]
    grad_A = list(_product(V.t(), x, dtype).split(ranks))
    slices = zip(adapters.columns_of_y(), adapters.columns_of_U(), strict=True)
    return grad_A, [_product(g[:, out].t(), U[:, rank], dtype) for out, rank in slices]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute a b in `dtype`, on a GPU without rounding to the dtype of a before."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _write_dense(weight: Weight, rows: Tensor) -> None:
    """Write a weight to `rows` [N_i, K], rounded as in `HQQLinear.forward`."""
    if isinstance(weight, Tensor):
        rows.copy_(weight)
        return
    rounded_to = matmul.rounding_dtype(rows.dtype, weight.params.compute_dtype)
    if rounded_to == rows.dtype:
        matmul.dequantize_into(weight, rows)
    else:
        rows.copy_(matmul.dequantize(weight, rounded_to))


def _out_features(weight: Weight) -> int:
    return len(weight) if isinstance(weight, Tensor) else weight.layout.out_features


def _slices(sizes: Sequence[int]) -> list[slice]:
    slices, start = [], 0
    for size in sizes:
        slices.append(slice(start, start + size))
        start += size
    return slices
