"""Rotary position embeddings of query and key as one kernel, with its gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hqqtrain_kernels import rotary
from hqqtrain_kernels.autocast import COMPUTE_DTYPES


def is_computable(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel rotates these tensors now: in training, in a known dtype, whole heads."""
    tensors = (query, key, cos, sin)
    return (
        torch.is_grad_enabled()
        and query.dim() == key.dim() == 4
        and cos.dim() == 3
        and cos.stride() == sin.stride()
        and cos.shape[-2:] == (query.shape[2], query.shape[3])
        and cos.shape[0] in (1, query.shape[0])
        and query.dtype in COMPUTE_DTYPES
        and all(x.dtype == query.dtype and x.stride(-1) == 1 for x in tensors)
        and not torch.compiler.is_compiling()
    )


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return query and key with rotary position embeddings, as Llama has them.

    Args:
        query: [sequences, heads, tokens, head_size].
        key: [sequences, key_heads, tokens, head_size].
        cos: [sequences or 1, tokens, head_size], whose second half repeats the first.
        sin: As `cos`.
    """
    return _Rotation.apply(query, key, cos, sin)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back. Cosine and sine get none."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rotary.rotate(query, key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        query, key = (
            grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_query, grad_key)
        )
        return *rotary.rotate(query, key, cos, sin, inverse=True), None, None
