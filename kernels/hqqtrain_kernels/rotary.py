"""Rotary position embeddings as Llama has them, for query and key in one kernel.

The first half x of a head and its second half y become x cos - y sin and y cos + x sin. The inverse
rotation has the other sign of the sine, and is the gradient.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hqqtrain_kernels import backend


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate query and key. All is computed in fp32 and rounded once.

    Args:
        query: [sequences, heads, tokens, head_size], fp32, bf16 or fp16. Only the last dimension
            must be contiguous.
        key: [sequences, key_heads, tokens, head_size].
        cos: [sequences or 1, tokens, head_size], whose second half repeats the first.
        sin: As `cos`.
        inverse: Whether to rotate back.

    Returns:
        Query and key of the same shapes. In memory, the heads of a token are adjacent, as the
        output of a linear layer has them.
    """
    if backend.use_triton(query.device):
        return _triton_kernel()(query, key, cos, sin, inverse)
    half = query.shape[-1] // 2
    cosine, sine = (each[:, None, :, :half].float() for each in (cos, sin))
    if inverse:
        sine = -sine
    return _rotated(query, cosine, sine), _rotated(key, cosine, sine)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.float().chunk(2, dim=-1)
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return rotated.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)


@functools.cache
def _triton_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """Import the kernel when a GPU first needs it: Triton does not exist for macOS."""
    from hqqtrain_kernels import rotary_triton

    return rotary_triton.rotate
