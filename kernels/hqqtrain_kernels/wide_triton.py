"""The linear kernel for 17 to 128 rows of x, and for 8 bits: weights are unpacked in the product.

A weight is rounded as `dequantize` rounds it, and multiplied as any other: by so many rows of x
that this costs less than scaling what comes out. The weight stands first in the product,
y^T = W x^T: only the first operand of the tensor cores may come from registers. The warps of a
program lie along its rows of the weight, or each of its `parts` takes a stretch of all of them,
which keeps warps busy where outputs are few.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.blocks_triton import dot, meta, words, x_chunk
from hqqtrain_kernels.fields_triton import numbers, part
from hqqtrain_kernels.launch_triton import INTERPRETED, MOST_REGISTERS, Variant
from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.partial_triton import DTYPES
from hqqtrain_kernels.table import Wide


def launch(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout,
    settings: Wide,
) -> Tensor:  # fmt: skip
    """[M, out_features], of x [M, in_features] with the elements of a row adjacent."""
    (M, K), N = x.shape, layout.out_features
    stride = x.stride(0)
    unit = 8 if stride % 8 == 0 else 1
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    grid = (-(-N // settings.rows), -(-M // settings.batch), 1)
    variant = _variant(layout, settings, x.dtype, unit)
    variant.launch(grid, (x, W_q, scale, zero, bias, y), (M, N, K, stride // unit))
    return y


@functools.lru_cache(maxsize=4096)
def _variant(layout: Layout, settings: Wide, dtype: torch.dtype, unit: int) -> Variant:
    """The kernel for these; one and the same for all weights that differ in nothing it is told."""
    g, whole = layout.group_size, settings.span * settings.parts
    return _shared(
        NBITS=layout.nbits, GROUP=g, X_STEP=unit, META_STEP=math.gcd(layout.groups, 8),
        ROWS=settings.rows, BATCH=settings.batch, SPAN=settings.span, PARTS=settings.parts,
        UNIT=min(g, settings.span), CHUNK=min(g, 64), WHOLE=layout.in_features % whole == 0,
        DTYPE=DTYPES[dtype], UPCAST=INTERPRETED, STAGES=settings.stages, warps=settings.warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _shared(warps: int, **constants: Any) -> Variant:
    stages = constants["STAGES"]
    return Variant(_wide, constants, num_warps=warps, num_stages=stages, maxnreg=MOST_REGISTERS)


@triton.jit(do_not_specialize=["M", "N", "K", "x_stride"])
def _wide(
    x, W_q, scale, zero, bias, y, M, N, K, x_stride,
    NBITS: tl.constexpr, GROUP: tl.constexpr, X_STEP: tl.constexpr, META_STEP: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """UNIT codes share a scale in a step; CHUNK of them are multiplied at once."""
    CHUNKS: tl.constexpr = UNIT // CHUNK
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    row = tl.minimum(n, N - 1).to(tl.int64)
    low_words = tl.cdiv(K * (2 if NBITS == 3 else NBITS), 128) * 4
    high_words = tl.cdiv(K, 128) * 4 if NBITS == 3 else 0
    W_q = W_q.to(tl.pointer_type(tl.int32), bitcast=True) + row * (low_words + high_words)
    groups = K // GROUP // META_STEP * META_STEP
    scale += row * groups
    zero += row * groups
    x_stride *= X_STEP
    acc = _zeros(ROWS, BATCH, PARTS)
    for step in tl.range(0, tl.cdiv(K, PARTS * SPAN), num_stages=STAGES):
        if NBITS == 3:
            W = numbers(words(W_q, step, low_words, 2, SPAN, PARTS, WHOLE), 2)
            high = words(W_q + low_words, step, high_words, 1, SPAN, PARTS, WHOLE)
            W += 4.0 * numbers(high, 1)
        else:
            W = numbers(words(W_q, step, low_words, NBITS, SPAN, PARTS, WHOLE), NBITS)
        W = tl.reshape(W, (PARTS * ROWS, SPAN // CHUNK, CHUNK))
        s = meta(scale, step, groups, GROUP, SPAN, PARTS, WHOLE)
        z = meta(zero, step, groups, GROUP, SPAN, PARTS, WHOLE)
        for j in tl.static_range(SPAN // CHUNK):
            a = _apart(part(W, j), PARTS)
            a -= _apart(part(z, j // CHUNKS), PARTS).to(tl.float32)
            a *= _apart(part(s, j // CHUNKS), PARTS).to(tl.float32)
            b = x_chunk(x, x_stride, m, M, K, step, j, CHUNK, SPAN, PARTS, WHOLE)
            acc = dot(a.to(DTYPE), b, acc, UPCAST)
    _store(y, bias, acc, n, N, m, M, PARTS, DTYPE)


@triton.jit
def _store(y, bias, acc, n, N, m, M, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    if PARTS > 1:
        acc = tl.sum(acc, 0)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + m.to(tl.int64)[None, :] * N + n[:, None], acc.to(DTYPE), mask=inside)


@triton.jit
def _zeros(ROWS: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr):
    if PARTS > 1:
        zeros = tl.zeros((PARTS, ROWS, BATCH), tl.float32)
    else:
        zeros = tl.zeros((ROWS, BATCH), tl.float32)
    return zeros


@triton.jit
def _apart(t, PARTS: tl.constexpr):
    """[PARTS * rows, columns] -> [PARTS, rows, columns]; one part stays 2-D, as wgmma wants it."""
    if PARTS > 1:
        t = tl.reshape(t, (PARTS, t.shape[0] // PARTS, t.shape[1]))
    return t
