"""RMSNorms with a frozen weight as one kernel each, also together with a residual connection."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hqqtrain_kernels import rms_norm as kernels
from hqqtrain_kernels.autocast import COMPUTE_DTYPES
from hqqtrain_kernels.norm_params import NormParams


def is_computable(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernels norm `hidden` now: in training, in a known dtype, and a short row."""
    return (
        torch.is_grad_enabled()
        and type(hidden) is Tensor
        and hidden.dtype in COMPUTE_DTYPES
        and hidden.dtype == weight.dtype
        and hidden.device == weight.device
        and hidden.shape[-1] <= kernels.MAX_COLUMNS
        and not torch.compiler.is_compiling()
    )


def rms_norm(hidden: Tensor, weight: Tensor, params: NormParams) -> Tensor:
    """Return the RMSNorm of the last dimension of `hidden` [..., hidden_size], in its dtype.

    Args:
        hidden: [..., hidden_size]; `is_computable` with `weight`.
        weight: [hidden_size]; it gets no gradient.
        params: How to compute it.
    """
    return _RMSNorm.apply(hidden, None, weight, params)[1]


def residual_and_norm(
    residual: Tensor, output: Tensor | None, weight: Tensor, params: NormParams
) -> tuple[Tensor, Tensor]:
    """Return the residual stream with `output` added, if there is one, and its RMSNorm.

    The gradients of both are added in the backward kernel of the norm.

    Args:
        residual: The residual stream [..., hidden_size].
        output: The output of a module [..., hidden_size], in the same dtype; None adds nothing.
        weight: [hidden_size]; it gets no gradient.
        params: How to compute the norm.
    """
    return _RMSNorm.apply(residual, output, weight, params)


class _RMSNorm(torch.autograd.Function):
    """The sum of x and an addend, and its norm. Saves the sum, which the caller keeps anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, addend: Tensor | None, weight: Tensor, params: NormParams
    ) -> tuple[Tensor, Tensor]:
        """Compute both from x [..., hidden_size]."""
        if addend is None:
            total, normed = x, kernels.rms_norm(_rows(x), weight, params)
        else:
            total, normed = kernels.add_rms_norm(_rows(x), _rows(addend), weight, params)
            total = total.view(x.shape)
        ctx.params, ctx.has_addend = params, addend is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight)
        return total, normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> Any:
        """Compute the gradient of the sum, which is that of both of its parts."""
        total, weight = ctx.saved_tensors
        grad = grad_total
        if grad_normed is not None:
            other = None if grad_total is None else _rows(grad_total)
            rows = _rows(grad_normed), _rows(total)
            grad = kernels.rms_norm_backward(*rows, weight, ctx.params, other).view(total.shape)
        return grad, grad if ctx.has_addend else None, None, None


def _rows(x: Tensor) -> Tensor:
    """Return x as a contiguous matrix [rows, hidden_size]."""
    return x.reshape(-1, x.shape[-1]).contiguous()
