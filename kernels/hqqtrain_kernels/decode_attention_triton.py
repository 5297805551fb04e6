"""Attention of one new token over a cache of keys and values (the method of Flash-Decoding).

The cache is split over programs, because it has few heads: 8 programs would read the cache of an 8B
model, on a GPU with 132 multiprocessors. Each program computes the attention over its split for all
query heads that share a head of keys, and a second kernel combines the splits:

    out = sum over splits s of exp(m[s] - m) acc[s] / sum over splits s of exp(m[s] - m) l[s]

where m[s] is the largest score of a split, l[s] the sum of exp(score - m[s]), acc[s] the sum of
exp(score - m[s]) value, and m the largest m[s].

Source: Dao et al., Flash-Decoding for long-context inference, 2023.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launcher_triton import INTERPRETED, TRITON_DTYPES, CachedKernel
from hqqtrain_kernels.loads_triton import dot
from hqqtrain_kernels.pdl_triton import supports_pdl, wait_for_kernel_ahead
from hqqtrain_kernels.split_k_triton import multiprocessors

BLOCK_T = 64
"""Tokens of the cache in a step."""

BLOCK_H = 16
"""Query heads of a program, padded to the rows of a tensor core product."""

MAX_SPLITS = 64
"""Splits of the cache that a program of the second kernel holds at once."""


def is_supported(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels compute these tensors; `decode_attention` describes them."""
    head_dim = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype
        and query.shape[2] <= BLOCK_H
        and head_dim in (32, 64, 128, 256)
        and (mask is None or mask.dtype in (torch.bool, query.dtype, torch.float32))
    )


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Compute attention, [batch, key heads, heads of a group, head_dim].

    Args:
        query: [batch, key heads, heads of a group, head_dim], one token.
        key: [batch, key heads, tokens, head_dim].
        value: Like key.
        mask: [batch or 1, tokens]: True where a token is seen, or numbers that are added to the
            scores; None: all tokens are seen.
        scale: Factor of the products of query and key.
    """
    batch, key_heads, group, head_dim = query.shape
    tokens = key.shape[2]
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    heads = batch * key_heads
    blocks = -(-tokens // BLOCK_T)
    splits = min(blocks, MAX_SPLITS, max(1, multiprocessors(query.device) // heads))
    partial = query.new_empty((heads, splits, BLOCK_H, head_dim), dtype=torch.float32)
    # The largest score, and the sum of exp(score - largest), of each split and head.
    stats = query.new_empty((heads, splits, 2, BLOCK_H), dtype=torch.float32)
    out = torch.empty_like(query)
    mask_stride = 0
    if mask is not None:
        mask = mask.contiguous()
        mask_stride = tokens if mask.shape[0] > 1 else 0
    split_kernel, combine_kernel = _kernels(
        head_dim, scale, query.dtype, None if mask is None else mask.dtype == torch.bool,
        triton.next_power_of_2(splits), supports_pdl(query.device),
    )  # fmt: skip
    split_kernel.launch(
        grid=(heads, splits, 1),
        tensors={
            "query_ptr": query, "key_ptr": key, "value_ptr": value, "mask_ptr": mask,
            "partial_ptr": partial, "stats_ptr": stats,
        },
        integers={"tokens": tokens, "group": group, "key_heads": key_heads,
                  "mask_stride": mask_stride},
    )  # fmt: skip
    combine_kernel.launch(
        grid=(heads, group, 1),
        tensors={"partial_ptr": partial, "stats_ptr": stats, "out_ptr": out},
        integers={"splits": splits},
    )
    return out


@functools.lru_cache(maxsize=256)
def _kernels(
    head_dim: int, scale: float, dtype: torch.dtype, has_bool_mask: bool | None, splits: int,
    pdl: bool,
) -> tuple[CachedKernel, CachedKernel]:  # fmt: skip
    """Return the kernel of a split and the one that combines splits."""
    shared: dict[str, Any] = {
        "BLOCK_H": BLOCK_H, "HEAD_DIM": head_dim, "DTYPE": TRITON_DTYPES[dtype],
    }  # fmt: skip
    split = CachedKernel(
        _split_kernel,
        {"SCALE": scale, "BOOL_MASK": bool(has_bool_mask), "BLOCK_T": BLOCK_T, **shared,
         "UPCAST": INTERPRETED, "PDL": pdl},
        num_warps=4,
    )  # fmt: skip
    combine = CachedKernel(_combine_kernel, {"SPLITS": splits, **shared, "PDL": pdl}, num_warps=4)
    return split, combine


@triton.jit(do_not_specialize=["tokens", "group", "key_heads", "mask_stride"])
def _split_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    partial_ptr,
    stats_ptr,
    tokens,
    group,
    key_heads,
    mask_stride,
    SCALE: tl.constexpr,
    BOOL_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the sums of one head of keys over the blocks split, split + splits, ... of the cache.

    Keys and values of tokens that the mask hides are not read.
    """
    wait_for_kernel_ahead(PDL)
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, HEAD_DIM)
    row = (head * group + h)[:, None] * HEAD_DIM + d[None, :]
    query = tl.load(query_ptr + row, mask=(h < group)[:, None], other=0.0)
    key_ptr += head * tokens * HEAD_DIM
    value_ptr += head * tokens * HEAD_DIM
    if mask_ptr is not None:
        mask_ptr += head // key_heads * mask_stride
    largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, HEAD_DIM), tl.float32)
    for block in tl.range(split, tl.cdiv(tokens, BLOCK_T), splits):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        seen = t < tokens
        bias = tl.zeros((BLOCK_T,), tl.float32)
        if mask_ptr is not None:
            if BOOL_MASK:
                seen = tl.load(mask_ptr + t, mask=seen, other=0) != 0
            else:
                bias = tl.load(mask_ptr + t, mask=seen, other=0.0).to(tl.float32)
        offset = t.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
        key = tl.load(key_ptr + offset, mask=seen[:, None], other=0.0)
        value = tl.load(value_ptr + offset, mask=seen[:, None], other=0.0)
        zeros = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
        score = dot(query, tl.trans(key), acc=zeros, UPCAST=UPCAST) * SCALE + bias[None, :]
        score = tl.where(seen[None, :], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, 1))
        # A split that sees no token keeps -inf, and -inf - -inf would be NaN.
        finite = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weight = tl.exp(score - finite[:, None])
        correction = tl.exp(largest - finite)
        total = total * correction + tl.sum(weight, 1)
        acc = dot(weight.to(DTYPE), value, acc=acc * correction[:, None], UPCAST=UPCAST)
        largest = new_largest
    index = head * splits + split
    partial_row = (index * BLOCK_H + h)[:, None] * HEAD_DIM + d[None, :]
    tl.store(partial_ptr + partial_row, acc)
    tl.store(stats_ptr + index * (2 * BLOCK_H) + h, largest)
    tl.store(stats_ptr + index * (2 * BLOCK_H) + BLOCK_H + h, total)


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    partial_ptr,
    stats_ptr,
    out_ptr,
    splits,
    SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Combine the splits of one query head. SPLITS is the power of two from `splits` on."""
    wait_for_kernel_ahead(PDL)
    head, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    index = head * splits + s
    stats = stats_ptr + index * (2 * BLOCK_H) + h
    largest = tl.load(stats, mask=s < splits, other=float("-inf"))
    total = tl.load(stats + BLOCK_H, mask=s < splits, other=0.0)
    row = (index * BLOCK_H + h)[:, None] * HEAD_DIM + d[None, :]
    partial = tl.load(partial_ptr + row, mask=(s < splits)[:, None], other=0.0)
    weight = tl.exp(largest - tl.max(largest, 0))
    out = tl.sum(weight[:, None] * partial, 0) / tl.sum(weight * total, 0)
    out_row = (head * tl.num_programs(1) + h) * HEAD_DIM + d
    tl.store(out_ptr + out_row, out.to(DTYPE))
