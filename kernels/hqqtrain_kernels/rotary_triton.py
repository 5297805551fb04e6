"""Rotary position embeddings: one program rotates all heads of a token, of query and key."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launcher_triton import CachedKernel

_STRIDES = ("sequence", "head", "token")


@triton.jit
def _rotate_heads(
    in_ptr,
    out_ptr,
    stride_head,
    cos,
    sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotate the heads of one token, which are adjacent in the output."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < HEADS) & (column < HALF)
    left_ptr = in_ptr + head * stride_head + column
    left = tl.load(left_ptr, mask, 0).to(tl.float32)
    right = tl.load(left_ptr + HALF, mask, 0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    left_out = out_ptr + head * (2 * HALF) + column
    tl.store(left_out, (left * cos - right * sin).to(dtype), mask)
    tl.store(left_out + HALF, (right * cos + left * sin).to(dtype), mask)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "query_sequence",
        "query_head",
        "query_token",
        "key_sequence",
        "key_head",
        "key_token",
        "cos_sequence",
        "cos_token",
    ]
)
def _rotate_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    tokens,
    query_sequence,
    query_head,
    query_token,
    key_sequence,
    key_head,
    key_token,
    cos_sequence,
    cos_token,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEY_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotate all heads of one token; the strides are those of the sequences, heads and tokens."""
    row = tl.program_id(0).to(tl.int64)
    sequence, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK_HALF)[None, :]
    at = sequence * cos_sequence + token * cos_token + column
    cos = tl.load(cos_ptr + at, column < HALF, 0).to(tl.float32)
    sin = tl.load(sin_ptr + at, column < HALF, 0).to(tl.float32)
    if INVERSE:
        sin = -sin
    query_at = sequence * query_sequence + token * query_token
    key_at = sequence * key_sequence + token * key_token
    _rotate_heads(
        query_ptr + query_at,
        query_out_ptr + row * (HEADS * 2 * HALF),
        query_head,
        cos,
        sin,
        HEADS,
        HALF,
        BLOCK_HEADS,
        BLOCK_HALF,
    )
    _rotate_heads(
        key_ptr + key_at,
        key_out_ptr + row * (KEY_HEADS * 2 * HALF),
        key_head,
        cos,
        sin,
        KEY_HEADS,
        HALF,
        BLOCK_KEY_HEADS,
        BLOCK_HALF,
    )


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return rotated query and key; see `rotary.rotate`."""
    sequences, heads, tokens, size = query.shape
    query_out = query.new_empty(sequences, tokens, heads, size)
    key_out = key.new_empty(sequences, tokens, key.shape[1], size)
    assert all(x.stride(-1) == 1 for x in (query, key, cos, sin))
    assert cos.stride() == sin.stride()
    if sequences and tokens:
        strides = {
            f"{name}_{axis}": stride
            for name, x in (("query", query), ("key", key))
            for axis, stride in zip(_STRIDES, x.stride(), strict=False)
        }
        cos_sequence = cos.stride(0) if cos.shape[0] > 1 else 0
        strides |= {"cos_sequence": cos_sequence, "cos_token": cos.stride(1)}
        tensors: dict[str, Tensor | None] = {
            "query_ptr": query, "key_ptr": key, "cos_ptr": cos, "sin_ptr": sin,
            "query_out_ptr": query_out, "key_out_ptr": key_out,
        }  # fmt: skip
        kernel = _cached(heads, key.shape[1], size // 2, inverse)
        kernel.launch((sequences * tokens, 1, 1), tensors, {"tokens": tokens, **strides})
    return query_out.transpose(1, 2), key_out.transpose(1, 2)


@functools.cache
def _cached(heads: int, key_heads: int, half: int, inverse: bool) -> CachedKernel:
    constants = {
        "HEADS": heads, "KEY_HEADS": key_heads, "HALF": half, "INVERSE": inverse,
        "BLOCK_HEADS": triton.next_power_of_2(heads),
        "BLOCK_KEY_HEADS": triton.next_power_of_2(key_heads),
        "BLOCK_HALF": triton.next_power_of_2(half),
    }  # fmt: skip
    return CachedKernel(_rotate_kernel, constants, num_warps=4)
