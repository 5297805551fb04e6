r"""The products of linears with LoRA that have the same input, and of their gradients.

Linear i has a frozen weight W_i [N_i, K], a bias b_i, the matrices A_i [r_i, K] and B_i [N_i, r_i],
and the scaling s_i. All have the input x [M, K]; g_i is the gradient of y_i:

    forward:   U   = s (x A^T)              [M, r]     all A_i side by side
               y_i = U_i B_i^T + b_i        [M, N_i]
               y_i += x W_i^T
    backward:  V_i = s_i (g_i B_i)          [M, r_i]
               grad_x   = V A               [M, K]
               grad_x  += g_i W_i           for every i
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


class Copies(NamedTuple):
    """Tensors to be filled from others of the same shapes, in one operation.

    Attributes:
        targets: The tensors to fill.
        sources: Their values, of any dtype.
    """

    targets: list[Tensor]
    sources: list[Tensor]


def cast_adapters(
    A: Sequence[Tensor], B: Sequence[Tensor], scalings: tuple[float, ...], dtype: torch.dtype
) -> Adapters:
    """Return the matrices A_i [r_i, K] and B_i [N_i, r_i] in `dtype`, the A_i in one tensor."""
    adapters, copies = new_adapters(A, B, scalings, dtype)
    if copies.targets:
        copy_tensors(*copies)
    return adapters


def new_adapters(
    A: Sequence[Tensor], B: Sequence[Tensor], scalings: tuple[float, ...], dtype: torch.dtype
) -> tuple[Adapters, Copies]:
    """Return what `cast_adapters` returns, with the copies that are left to do."""
    copies = Copies([], [])
    stacked, cast_B = A[0], list(B)
    if len(A) > 1 or A[0].dtype != dtype:
        stacked = A[0].new_empty(sum(len(each) for each in A), A[0].shape[1], dtype=dtype)
        copies.targets.extend(stacked.split([len(each) for each in A]))
        copies.sources.extend(A)
    for i, each in enumerate(B):
        if each.dtype != dtype:
            cast_B[i] = torch.empty_like(each, dtype=dtype)
            copies.targets.append(cast_B[i])
            copies.sources.append(each)
    return Adapters(stacked, tuple(cast_B), scalings), copies


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
    U = x.new_empty(x.shape[0], adapters.A.shape[0])
    U.addmm_(x, adapters.A.t(), beta=0, alpha=scalings[0] if alike else 1)
    if not alike:
        for U_i, scaling in zip(_split_ranks(U, adapters), scalings, strict=True):
            U_i.mul_(scaling)
    return U


def outputs(
    x: Tensor, U: Tensor, W: Tensor, biases: Sequence[Tensor | None], adapters: Adapters
) -> tuple[Tensor, ...]:
    """Compute every y_i [M, N_i], in memory of its own: a saved v must not keep q and k alive.

    Args:
        x: The input [M, K].
        U: s (x A^T) [M, r].
        W: All weights, one below the other [N, K].
        biases: The bias [N_i] of each linear, or what is added to its output [M, N_i], or None.
        adapters: The LoRA matrices.
    """
    heights = [B.shape[0] for B in adapters.B]
    ys = tuple(x.new_empty(x.shape[0], height) for height in heights)
    _write_small_products(ys, U, biases, adapters)
    for y, W_i in zip(ys, W.split(heights), strict=True):
        y.addmm_(x, W_i.t())
    return ys


def joined_outputs(
    x: Tensor, U: Tensor, W: Tensor, biases: Sequence[Tensor | None], adapters: Adapters
) -> Tensor:
    """Compute all y_i side by side [M, N], with one large product. The arguments are the same."""
    y = x.new_empty(x.shape[0], W.shape[0])
    _write_small_products(split_outputs(y, adapters), U, biases, adapters)
    return y.addmm_(x, W.t())


def split_outputs(y: Tensor, adapters: Adapters) -> Sequence[Tensor]:
    """Return the parts [M, N_i] of tensors that lie side by side [M, N]."""
    return y.split([B.shape[0] for B in adapters.B], dim=1)


def project_gradients(gs: Sequence[Tensor], adapters: Adapters) -> Tensor:
    """Compute V [M, r], the columns V_i = s_i (g_i B_i), from every g_i [M, N_i]."""
    V = gs[0].new_empty(gs[0].shape[0], adapters.A.shape[0])
    parts = zip(_split_ranks(V, adapters), gs, adapters.B, adapters.scalings, strict=True)
    for V_i, g, B, scaling in parts:
        V_i.addmm_(g, B, beta=0, alpha=scaling)
    return V


def input_gradient(gs: Sequence[Tensor], V: Tensor, W: Tensor, adapters: Adapters) -> Tensor:
    """Compute grad_x = V A + the sum of all g_i W_i [M, K]; gs may also be one joined g [M, N]."""
    grad_x = torch.mm(V, adapters.A)
    for g, W_i in zip(gs, W.split([g.shape[1] for g in gs]), strict=True):
        grad_x.addmm_(g, W_i)
    return grad_x


def adapter_gradients(
    gs: Sequence[Tensor], x: Tensor, U: Tensor, V: Tensor, adapters: Adapters, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute grad_A_i [r_i, K] and grad_B_i [N_i, r_i] of every linear, in `dtype`."""
    grad_A = _product(V.t(), x, dtype).split([B.shape[1] for B in adapters.B])
    parts = zip(gs, _split_ranks(U, adapters), strict=True)
    return list(grad_A), [_product(g.t(), U_i, dtype) for g, U_i in parts]


def _write_small_products(
    ys: Sequence[Tensor], U: Tensor, biases: Sequence[Tensor | None], adapters: Adapters
) -> None:
    """Write U_i B_i^T + b_i to every y_i [M, N_i]."""
    parts = zip(ys, _split_ranks(U, adapters), adapters.B, biases, strict=True)
    for y, U_i, B, bias in parts:
        if bias is None:
            torch.mm(U_i, B.t(), out=y)
        else:
            torch.addmm(bias.to(y.dtype), U_i, B.t(), out=y)


def _split_ranks(U: Tensor, adapters: Adapters) -> Sequence[Tensor]:
    """Return the columns of U or V that belong to each linear [M, r_i]."""
    return U.split([B.shape[1] for B in adapters.B], dim=1)


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
