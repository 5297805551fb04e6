"""A linear layer for few rows of x in one kernel, which unpacks the weight where it multiplies.

Generation is bound by reading the weight, so it is read packed, once, and never written. Two ways:

- Of many rows of x, a weight is rounded as `dequantize` rounds it and multiplied as any other.
- Of few, codes are too many for that much arithmetic on each. They are multiplied as integers,
  exact in bf16 and fp16, and scale and zero meet the fp32 sum of a group:
  y = sum_g s_g (q_g . x_g - z_g sum(x_g)). No weight is rounded.

The weight stands first in the product, y^T = W x^T: only the first operand of the tensor cores may
come from registers. The warps of a program lie along its rows of the weight, or each of its
`parts` takes a stretch of all of them, which keeps warps busy where outputs are few.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels import table
from hqqtrain_kernels.blocks_triton import meta, read_sum, words, x_chunk, x_sums
from hqqtrain_kernels.fields_triton import halves, hidden, integers, numbers, part
from hqqtrain_kernels.launch_triton import INTERPRETED, Variant
from hqqtrain_kernels.layout import Layout

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def linear(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor | None:
    """x [..., in_features] times the dequantized weight transposed, plus bias, in the dtype of x.

    W_q, scale, zero: as for `dequantize_triton`. None where `table` would rather dequantize, for an
    x of another dtype than bf16 and fp16, and for what does not fit together, which dequantizing
    and multiplying refuse with words.
    """
    K = layout.in_features
    M = x.numel() // K
    settings = table.choose(_capability(x.device), layout, M) if x.dtype in DTYPES else None
    if settings is None or not _fit(x, W_q, scale, zero, bias, layout):
        return None
    rows = x if x.dim() == 2 else x.reshape(M, K)
    if rows.stride(1) != 1 or rows.stride(0) >= 1 << 31:
        rows = rows.contiguous()
    y = launch(rows, W_q, scale, zero, bias, layout, settings)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], layout.out_features)


def _fit(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout
) -> bool:
    meta_shape = (layout.units, layout.groups)
    return (
        x.shape[-1] == layout.in_features
        and x.device == W_q.device == scale.device == zero.device
        and W_q.nbytes == layout.units * layout.row_bytes
        and scale.shape == meta_shape
        and zero.shape == meta_shape
        and W_q.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
        and (bias is None or (bias.shape == (layout.out_features,) and bias.is_contiguous()))
    )  # fmt: skip


def launch(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, layout: Layout,
    settings: table.Settings,
) -> Tensor:  # fmt: skip
    """`linear` as `settings` say, of x [M, in_features] with the elements of a row adjacent."""
    (M, K), N = x.shape, layout.out_features
    stride = x.stride(0)
    step = 8 if stride % 8 == 0 else 1
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    sums = None
    if settings.sums:
        unit = min(layout.group_size, settings.span)
        sums = x.view(M, K // unit, unit).sum(2, dtype=torch.float32)
    grid = (-(-N // settings.rows), -(-M // settings.batch), 1)
    variant = _variant(layout, settings, x.dtype, step)
    variant.launch(grid, (x, W_q, scale, zero, bias, sums, y), (M, N, K, stride // step))
    return y


@functools.lru_cache(maxsize=4096)
def _variant(layout: Layout, settings: table.Settings, dtype: torch.dtype, step: int) -> Variant:
    """The kernel for these; one and the same for all weights that differ in nothing it is told."""
    g, whole = layout.group_size, settings.span * settings.parts
    half = dtype == torch.float16  # its smallest numbers are the codes; bf16 has them above 128
    return _shared(
        NBITS=layout.nbits, GROUP=g, X_STEP=step, META_STEP=math.gcd(layout.groups, 8),
        ROWS=settings.rows, BATCH=settings.batch, SPAN=settings.span, PARTS=settings.parts,
        UNIT=min(g, settings.span), CHUNK=min(g, 64), OFFSET=0.0 if half else 128.0,
        TINY=2.0**-24 if half else 1.0, ROUNDED=settings.rounded,
        WHOLE=layout.in_features % whole == 0, DTYPE=DTYPES[dtype], UPCAST=INTERPRETED,
        STAGES=settings.stages, warps=settings.warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _shared(warps: int, **constants: Any) -> Variant:
    return Variant(_linear, constants, num_warps=warps, num_stages=constants["STAGES"])


def _capability(device: torch.device) -> tuple[int, int]:
    """Of the interpreter too: that of the GPU that `table` was measured on."""
    return _capability_of(device.index) if device.type == "cuda" else (9, 0)


@functools.cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@triton.jit(do_not_specialize=["M", "N", "K", "x_stride"])
def _linear(
    x, W_q, scale, zero, bias, sums, y, M, N, K, x_stride,
    NBITS: tl.constexpr, GROUP: tl.constexpr, X_STEP: tl.constexpr, META_STEP: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr, OFFSET: tl.constexpr, TINY: tl.constexpr,
    ROUNDED: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """UNIT codes share a scale in a step; CHUNK of them are multiplied at once.

    Integer operands are (code + OFFSET) * TINY.
    """
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
            low = words(W_q, step, low_words, 2, SPAN, PARTS, WHOLE)
            high = words(W_q + low_words, step, high_words, 1, SPAN, PARTS, WHOLE)
            W = _weights(low, 2, high, ROUNDED, DTYPE)
        else:
            low = words(W_q, step, low_words, NBITS, SPAN, PARTS, WHOLE)
            W = _weights(low, NBITS, None, ROUNDED, DTYPE)
        W = tl.reshape(W, (PARTS * ROWS, SPAN // CHUNK, CHUNK))
        s = meta(scale, step, groups, GROUP, SPAN, PARTS, WHOLE)
        z = meta(zero, step, groups, GROUP, SPAN, PARTS, WHOLE)
        if not ROUNDED and sums is None:
            sums_here = x_sums(x, x_stride, M, K, step, UNIT, BATCH, SPAN, PARTS, WHOLE)
        p = _zeros(ROWS, BATCH, PARTS)
        for j in tl.static_range(SPAN // CHUNK):
            b = x_chunk(x, x_stride, m, M, K, step, j, CHUNK, SPAN, PARTS, WHOLE)
            a = _apart(part(W, j), PARTS)
            s_unit = _apart(part(s, j // CHUNKS), PARTS).to(tl.float32)
            z_unit = _apart(part(z, j // CHUNKS), PARTS).to(tl.float32)
            if ROUNDED:
                acc = _dot(((a - z_unit) * s_unit).to(DTYPE), b, acc, UPCAST)
            else:
                p = _dot(a, b, p, UPCAST)
                if j % CHUNKS == CHUNKS - 1:
                    if sums is None:
                        x_sum = part(sums_here, j // CHUNKS)
                    else:
                        x_sum = read_sum(sums, m, M, K, step, j // CHUNKS, UNIT, SPAN, PARTS, WHOLE)
                    x_sum = _across(x_sum, BATCH, PARTS)
                    acc += (p - (z_unit + OFFSET) * TINY * x_sum) * (s_unit / TINY)
                    p = _zeros(ROWS, BATCH, PARTS)
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
def _weights(low, WIDTH: tl.constexpr, high, ROUNDED: tl.constexpr, DTYPE: tl.constexpr):
    """Codes as fp32, or as 16-bit floats, in bf16 128 above them: [rows, codes]."""
    if ROUNDED:
        W = numbers(low, WIDTH)
        if high is not None:
            W += 4.0 * numbers(high, 1)
    else:
        pairs = integers(low, WIDTH, 0)
        if tl.bfloat16 == DTYPE:
            pairs |= hidden(0x43004300, low.shape[0])
        if high is not None:
            pairs |= integers(high, 1, 2)
        W = halves(pairs, DTYPE)
    return W


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


@triton.jit
def _across(t, BATCH: tl.constexpr, PARTS: tl.constexpr):
    """[PARTS * BATCH] -> what is the same for all rows of `_apart`."""
    return tl.reshape(t, (PARTS, 1, BATCH)) if PARTS > 1 else tl.reshape(t, (BATCH,))[None, :]


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
