"""Packing at the end of a kernel, compared with the reference's packing."""

import pytest
import torch
from kernel_weights import DEVICE

from hqqtrain_kernels import pack
from hqqtrain_kernels.layout import packed_bytes, plane_widths

pytest.importorskip("triton", reason="Triton is not installed here")
import triton
from triton import language as tl

from hqqtrain_kernels.pack_triton import store_packed

CELL = 128
"""Codes that fill whole tiles, also of the planes of one bit."""


@triton.jit
def pack_kernel(codes_ptr, out_ptr, n, NBITS: tl.constexpr, LOW_PLANE_TILES: tl.constexpr,
                CELL: tl.constexpr, REVERSED: tl.constexpr):  # fmt: skip
    """Pack two cells of a unit of n codes: in their order, or as a block of numbers, reversed."""
    first = tl.program_id(0) * 2
    block = first + tl.arange(0, 2)
    if REVERSED:
        block = first + 1 - tl.arange(0, 2)
    at = tl.reshape(block[:, None] * CELL + tl.arange(0, CELL)[None, :], (2 * CELL,))
    codes = tl.load(codes_ptr + at, at < n, 0).to(tl.int32)
    store_packed(
        codes=tl.reshape(codes, (CELL // 4, 8)),
        unit_ptr=out_ptr,
        cell=block if REVERSED else first,
        chunks=tl.cdiv(n, 8),
        CELL_CODES=CELL,
        NBITS=NBITS,
        LOW_PLANE_TILES=LOW_PLANE_TILES,
    )


@pytest.mark.parametrize("cells_are_reversed", [False, True])
@pytest.mark.parametrize("n", [512, 400])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_bits_of_the_reference_and_nothing_behind_them(
    nbits: int, n: int, cells_are_reversed: bool
) -> None:
    codes = torch.randint(0, 1 << nbits, (1, n), dtype=torch.uint8, device=DEVICE)
    expected = pack(codes, nbits)
    out = torch.full((expected.shape[1] + 16,), 0xAB, dtype=torch.uint8, device=DEVICE)
    pack_kernel[(2,)](
        codes,
        out.view(torch.int16),
        n,
        NBITS=nbits,
        LOW_PLANE_TILES=packed_bytes(n, plane_widths(nbits)[0]) // 16,
        CELL=CELL,
        REVERSED=cells_are_reversed,
    )
    assert torch.equal(out[:-16], expected[0])
    assert (out[-16:] == 0xAB).all()
