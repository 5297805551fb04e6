"""Linears with LoRA that have the same input, such as q, k and v, as one autograd function."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hqqtrain.nn.lora_blocks import products
from hqqtrain.nn.lora_blocks.adapted_linear import AdaptedLinear
from hqqtrain.nn.lora_blocks.adapter_casts import AdapterCasts
from hqqtrain.nn.lora_blocks.frozen import FrozenLinears
from hqqtrain.nn.replacement import replace_attribute
from hqqtrain_kernels.autocast import COMPUTE_DTYPES, product_dtype, without_autocast


class SharedInputBlock:
    """Computes linears with the same input when the first of them is called.

    Each of the others returns its part, if it is called with the very same tensor. A call that a
    block cannot compute goes to PEFT's `forward`.

    Args:
        linears: The linears, whose modules get another `forward`.
        casts: Casts the adapters of all blocks.
        undo: Gives them their own again when it is closed; None: they keep it.
    """

    def __init__(
        self, linears: Sequence[AdaptedLinear], casts: AdapterCasts, undo: ExitStack | None = None
    ) -> None:
        self._linears = tuple(linears)
        self._casts, self._group = casts, casts.add(linears)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}
        for i, linear in enumerate(linears):
            forward = partial(self._forward, i, linear.module.forward)
            replace_attribute(linear.module, "forward", forward, undo)

    def _forward(self, i: int, plain: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the output of linear i for x [..., in_features]."""
        if self._input is not x or i not in self._outputs:
            if args or kwargs or not is_computable(x, self._linears):
                return plain(x, *args, **kwargs)
            self._input, self._outputs = x, dict(enumerate(self._compute(x)))
        y = self._outputs.pop(i)
        if not self._outputs:
            self._input = None
        return y

    def _compute(self, x: Tensor) -> Sequence[Tensor]:
        linears = self._linears
        frozen = FrozenLinears.of(linears)
        A, B = [linear.A for linear in linears], [linear.B for linear in linears]
        x = x.to(product_dtype(x))
        cast = self._casts.get(self._group, x.dtype)
        return _LinearsFunction.apply(x, frozen, cast, *A, *B)


def is_computable(x: Tensor, linears: Sequence[AdaptedLinear]) -> bool:
    """Whether a block may compute `linears` for x now: in training, without a compiler."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype in COMPUTE_DTYPES
        and all(linear.is_ready() for linear in linears)
    )


class _LinearsFunction(torch.autograd.Function):
    """The output [..., N_i] of every linear; the gradients of x, of all A_i and of all B_i.

    It saves x, U and the adapters in the dtype of the products, but no dense weight. Not even a
    recomputation keeps one, as that of an MLP does: the backward pass of the MLP, where a step has
    its peak of memory, comes in between.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: FrozenLinears, cast: products.Adapters | None, *AB: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the outputs from x [..., K], all A_i [r_i, K] and all B_i [N_i, r_i].

        `cast` has A and B in the dtype of x, if they are cast already.
        """
        n = len(AB) // 2
        with without_autocast(x):
            adapters = cast or products.cast_adapters(AB[:n], AB[n:], frozen.scalings, x.dtype)
            rows = x.reshape(-1, x.shape[-1])
            U = products.project(rows, adapters)
            W = products.dense_weight(frozen.weights, x.dtype)
            ys = products.outputs(rows, U, W, frozen.biases, adapters)
        ctx.frozen, ctx.dtype = frozen.settings(), AB[0].dtype
        ctx.save_for_backward(x, U, adapters.A, *adapters.B, *frozen.tensors())
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Any, ...]:
        """Compute the gradients from those of the outputs [..., N_i]."""
        saved = iter(ctx.saved_tensors)
        x, U, A = (next(saved) for _ in range(3))
        B = tuple(next(saved) for _ in ctx.frozen.scalings)
        with without_autocast(x):
            adapters = products.Adapters(A, B, ctx.frozen.scalings)
            gs = [grad_y.reshape(-1, grad_y.shape[-1]) for grad_y in grad_ys]
            rows = x.reshape(-1, x.shape[-1])
            V = products.project_gradients(gs, adapters)
            grads = products.adapter_gradients(gs, rows, U, V, adapters, ctx.dtype)
            grad_x = None
            if ctx.needs_input_grad[0]:
                W = products.dense_weight(ctx.frozen.take_weights(saved), x.dtype)
                grad_x = products.input_gradient(gs, V, W, adapters).view(x.shape)
        return grad_x, None, None, *grads[0], *grads[1]
