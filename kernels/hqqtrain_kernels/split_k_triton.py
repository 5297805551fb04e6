"""Split-K: the second kernel of a linear layer, which adds up partial sums over splits of K.

The kernels for few rows of x split K (in_features) over programs that do not communicate. Each
program writes its partial sums, and `reduce_split_k` adds them in the order of the splits. The bits
of the result therefore depend neither on the number of programs nor on the order in which they
finish.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqtrain_kernels.launcher_triton import (
    TRITON_DTYPES,
    CachedKernel,
)
from hqqtrain_kernels.pdl_triton import supports_pdl, wait_for_kernel_ahead


def programs_per_split(
    device: torch.device, programs_per_sm: int, num_splits: int, steps: int
) -> int:
    """Return the number of programs of each split of K.

    A step covers BLOCK_N rows of the weight, and the programs of a split take turns: program j of P
    makes the steps j, j + P, j + 2 P and so on. All of them therefore read adjacent rows.

    Args:
        device: Where the kernel runs.
        programs_per_sm: Programs that every multiprocessor gets, counted over all splits of K.
        num_splits: Splits of K.
        steps: Steps that cover all rows of the weight once.
    """
    most = max(1, multiprocessors(device) * programs_per_sm // num_splits)
    return -(-steps // -(-steps // most))  # no more than needed for as few steps each


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; for the interpreter, 2."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def reduce_split_k(partial: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Add the partial sums of all splits, and the bias.

    Args:
        partial: fp32 [num_splits, N, BLOCK_M].
        bias: [N], or None.
        x: The input [M, K] of the layer, M <= BLOCK_M, which determines M, dtype and device.

    Returns:
        y [M, N].
    """
    num_splits, N, block_m = partial.shape
    M = x.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    block_n = min(128, 512 // block_m)
    kernel = _cached_kernel(block_m, block_n, x.dtype, supports_pdl(x.device))
    kernel.launch(
        grid=(-(-N // block_n), 1, 1),
        tensors={"partial_ptr": partial, "bias_ptr": bias, "y_ptr": y},
        integers={"M": M, "N": N, "num_splits": num_splits},
    )
    return y


@functools.cache
def _cached_kernel(block_m: int, block_n: int, dtype: torch.dtype, pdl: bool) -> CachedKernel:
    """Return the reducing kernel for a block size. Its blocks give a thread few numbers.

    The kernel mostly waits for memory, and many threads hide this latency better than few.
    """
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "DTYPE": TRITON_DTYPES[dtype],
        "PDL": pdl,
    }
    return CachedKernel(_reduce_split_k_kernel, constants, num_warps=4)


@triton.jit(do_not_specialize=["M", "N", "num_splits"])
def _reduce_split_k_kernel(
    partial_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    num_splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Reduce all splits of BLOCK_N outputs for all rows of x."""
    wait_for_kernel_ahead(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n_mask = (n < N)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Add in the order of the splits. The loop is unrolled, so that 8 loads are in flight at once.
    for _ in tl.range(0, num_splits, loop_unroll_factor=8):
        acc += tl.load(partial_ptr + n[:, None] * BLOCK_M + m[None, :], mask=n_mask, other=0.0)
        partial_ptr += N * BLOCK_M
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    # acc is a block of y^T. Store it transposed, without the rows that pad x to BLOCK_M.
    y_ptr += m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_ptr, acc.to(DTYPE), mask=n_mask & (m < M)[None, :])
