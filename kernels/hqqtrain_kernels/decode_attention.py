"""`hqqtrain::decode_attention`: attention of one new token, as a PyTorch operator.

A compiled model calls it, and the compiler does not look into it. On a GPU it is a Triton kernel,
elsewhere two products.
"""

import torch
from torch import Tensor

from hqqtrain_kernels import backend
from hqqtrain_kernels.op_library import LIBRARY

LIBRARY.define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor"
)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Compute the attention of one token for query heads that share heads of keys and values.

    Args:
        query: [batch, key heads, query heads of each, head_dim].
        key: [batch, key heads, tokens, head_dim].
        value: Like key.
        mask: Bool [batch or 1, tokens], True where a token is seen, or numbers that are added to
            the scores; None: all tokens are seen.
        scale: Factor of the products of query and key.

    Returns:
        Like query.
    """
    return torch.ops.hqqtrain.decode_attention.default(query, key, value, mask, scale)


def two_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Compute the same with PyTorch, with scores in fp32."""
    scores = (query.float() @ key.float().mT) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    elif mask is not None:
        scores = scores + mask[:, None, None]
    return scores.softmax(-1).to(value.dtype) @ value


def _impl(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if backend.use_triton(query.device):
        from hqqtrain_kernels import decode_attention_triton as kernels

        if kernels.is_supported(query, key, mask):
            return kernels.decode_attention(query, key, value, mask, scale)
    return two_products(query, key, value, mask, scale)


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


LIBRARY.impl("decode_attention", _impl, "CompositeExplicitAutograd")
torch.library.register_fake("hqqtrain::decode_attention", _fake, lib=LIBRARY)
