"""Packed words to operands, compared with the reference's unpacking."""

import pytest
import torch
from kernel_weights import DEVICE

from hqqtrain_kernels import unpack

pytest.importorskip("triton", reason="Triton is not installed here")
import triton
from triton import language as tl

from hqqtrain_kernels.unpack_triton import (
    codes_to_fp32,
    codes_to_pairs,
    opaque_constant,
    operand_format,
    pairs_to_halves,
    take,
)

ROWS, BYTES = 2, 32


@triton.jit
def codes_kernel(W_q_ptr, out_ptr, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr):
    words = tl.load(W_q_ptr + tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    codes = codes_to_fp32(words, WIDTH)
    n: tl.constexpr = WORDS * 32 // WIDTH
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * n + tl.arange(0, n)[None, :], codes)


@triton.jit
def pairs_kernel(W_q_ptr, out_ptr, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
                 INVERSE_STEP: tl.constexpr, FIELDS_PER_SHIFT: tl.constexpr):  # fmt: skip
    words = tl.load(W_q_ptr + tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    words = tl.reshape(words, (ROWS, WORDS // 4, 4))
    pairs = codes_to_pairs(
        words, WIDTH=WIDTH, FIRST_BIT=0, FIELDS_PER_SHIFT=FIELDS_PER_SHIFT, ADJACENT_PAIRS=1
    )
    halves = pairs_to_halves(pairs, tl.float16).to(tl.float32) * INVERSE_STEP
    n: tl.constexpr = WORDS * 32 // WIDTH
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * n + tl.arange(0, n)[None, :], halves)


@triton.jit
def take_kernel(t_ptr, out_ptr, j: tl.constexpr, N: tl.constexpr):
    row, n, column = tl.arange(0, 2), tl.arange(0, N), tl.arange(0, 4)
    t = tl.load(t_ptr + (row[:, None, None] * N + n[None, :, None]) * 4 + column[None, None, :])
    tl.store(out_ptr + row[:, None] * 4 + column[None, :], take(t, j))


@triton.jit
def constant_kernel(out_ptr):
    row = tl.arange(0, 16)[:, None, None]
    tl.store(out_ptr + row, opaque_constant(0x43004300, 16))


def packed_codes(nbits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random words of whole tiles, and their codes as fp32."""
    W_q = torch.randint(0, 256, (ROWS, BYTES), dtype=torch.uint8, device=DEVICE)
    return W_q.view(torch.int32), unpack(W_q, nbits, BYTES * 8 // nbits).float()


@pytest.mark.parametrize("nbits", [8, 4, 2, 1])
def test_codes_as_fp32_are_in_their_own_order(nbits: int) -> None:
    words, codes = packed_codes(nbits)
    got = torch.empty_like(codes)
    codes_kernel[(1,)](words, got, ROWS=ROWS, WORDS=BYTES // 4, WIDTH=nbits)
    assert torch.equal(got, codes)


@pytest.mark.parametrize("nbits", [4, 2, 1])
def test_codes_as_fp16_are_multiples_of_the_smallest_number(nbits: int) -> None:
    words, codes = packed_codes(nbits)
    got = torch.empty_like(codes)
    operand = operand_format(torch.float16, nbits)
    pairs_kernel[(1,)](
        words,
        got,
        ROWS=ROWS,
        WORDS=BYTES // 4,
        WIDTH=nbits,
        INVERSE_STEP=1 / operand["CODE_STEP"],
        FIELDS_PER_SHIFT=operand["FIELDS_PER_SHIFT"],
    )
    assert torch.equal(got, codes)


@pytest.mark.parametrize("nbits", [4, 3, 2, 1])
def test_operands_hold_every_code_exactly(nbits: int) -> None:
    """The largest operand, of the highest field that shares a shift, is below 256 in bf16."""
    largest = (1 << nbits) - 1
    bf16, fp16 = (operand_format(dtype, nbits) for dtype in (torch.bfloat16, torch.float16))
    operand = bf16["CODE_OFFSET"] + largest * 2 ** (nbits * (bf16["FIELDS_PER_SHIFT"] - 1))
    assert operand <= 255
    assert torch.tensor(operand).bfloat16().item() == operand
    tiny = largest * fp16["CODE_STEP"]
    assert torch.tensor(tiny).half().item() == tiny


@pytest.mark.parametrize("n", [1, 2, 8])
def test_take_selects_a_column(n: int) -> None:
    t = torch.arange(2 * n * 4, device=DEVICE).float().view(2, n, 4)
    for j in range(n):
        out = torch.empty(2, 4, device=DEVICE)
        take_kernel[(1,)](t, out, j=j, N=n)
        assert torch.equal(out, t[:, j])


def test_an_opaque_constant_is_that_constant() -> None:
    out = torch.empty(16, dtype=torch.int32, device=DEVICE)
    constant_kernel[(1,)](out)
    assert (out == 0x43004300).all()
