"""Sums of a linear layer over stretches of its inputs, added up in order.

The kernels for few rows of x cut in_features into stretches, whose programs know nothing of each
other. What they leave is added here, always in the order of the stretches, so that the bits do not
depend on how many programs there were, or which came first.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launch_triton import Variant

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def steps_each(device: torch.device, programs: int, stretches: int, steps: int) -> int:
    """Of `steps` over the rows of the weight, so many to a program, if every multiprocessor gets
    `programs` of them, which share all stretches."""
    return -(-steps // max(1, _multiprocessors(device) * programs // stretches))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of this GPU; a small number for the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def add(partial: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """partial [stretches, out_features, batch], fp32: [M, out_features], as x is, M <= batch.

    `like` is that x [M, in_features]; bias [out_features].
    """
    count, N, batch = partial.shape
    y = torch.empty((like.shape[0], N), dtype=like.dtype, device=like.device)
    rows = min(128, 512 // batch)
    grid = (-(-N // rows), 1, 1)
    _variant(batch, rows, like.dtype).launch(grid, (partial, bias, y), (y.shape[0], N, count))
    return y


@functools.cache
def _variant(batch: int, rows: int, dtype: torch.dtype) -> Variant:
    """A few numbers to a thread: it does little but wait for them, so many threads are to wait."""
    constants = {"BATCH": batch, "ROWS": rows, "DTYPE": DTYPES[dtype]}
    return Variant(_add, constants, num_warps=4)


@triton.jit(do_not_specialize=["M", "N", "count"])
def _add(
    partial, bias, y, M, N, count, BATCH: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, BATCH)
    outputs = (n < N)[:, None]
    acc = tl.zeros((ROWS, BATCH), tl.float32)
    for _ in tl.range(0, count, loop_unroll_factor=8):
        acc += tl.load(partial + n[:, None] * BATCH + m[None, :], mask=outputs, other=0.0)
        partial += N * BATCH
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y += m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y, acc.to(DTYPE), mask=outputs & (m < M)[None, :])
