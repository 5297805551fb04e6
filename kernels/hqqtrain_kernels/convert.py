"""hqq's packed weights to ours and back, bit for bit, so that checkpoints can cross the border.

hqq 0.2.8 groups a weight to a matrix [groups, group_size] (axis 1) or [group_size, groups]
(axis 0) and packs its distant rows together: with k codes in a number, number [r, c] holds the
codes [r, c], [r + step, c], [r + 2 step, c] ... of step = ceil(rows / k) rows, the first in its
highest bits (hqq/core/bitpack.py). Its groups are those of our layout, in another order.

Plain torch, on the tensors' own device and in parts of whole units, so that little memory is needed
besides the result. That is far from what a GPU's memory allows (28672x8192 on an H200: 2 to 18 ms,
where copying the packed bytes takes 0.01 to 0.1), yet scaled to a Llama-70B it is 5 s, once.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.reference import CHUNK_CODES, pack, unpack

NUMBERS = {
    8: (torch.uint8, 1), 4: (torch.uint8, 2), 3: (torch.int32, 10), 2: (torch.uint8, 4),
    1: (torch.uint8, 8),
}  # fmt: skip
"""By nbits: what hqq packs into, and how many codes. 8bit_u8, 4bit_u8, 3bit_32, 2bit_u8, 1bit_u8"""


def from_hqq(
    W_q: Tensor, meta_scale: Tensor, meta_zero: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """W_q, scale and zero of an hqq layer as ours: uint8 [units, row_bytes] and 2 [units, groups].

    W_q is as hqq packs it, [ceil(groups / k), group_size] for axis 1 and [ceil(group_size / k),
    groups] for axis 0, with the groups of the whole weight: uint8, for 3 bits int32 (k = 10), or
    either viewed as a float. meta_scale and meta_zero: [groups, 1] for axis 1, [1, groups] for
    axis 0, of any dtype, which is kept.

    Raises ValueError for other shapes and dtypes, and for rows that hqq cannot pack.
    """
    rows, columns, meta = _shapes(layout)
    dtype, fields = NUMBERS[layout.nbits]
    if W_q.dtype != dtype and W_q.is_floating_point():
        W_q = W_q.view(dtype)
    _expect("W_q", W_q, (math.ceil(rows / fields), columns), dtype)
    _expect("scale", meta_scale, meta)
    _expect("zero", meta_zero, meta)
    packed = W_q.new_empty(layout.units, layout.row_bytes, dtype=torch.uint8)
    for units in _parts(layout):
        codes = _to_units(_read(W_q, layout, *_place(layout, units)), layout)
        packed[units] = pack(codes, layout.nbits)
    ours = (layout.units, layout.groups)
    return packed, meta_scale.reshape(ours), meta_zero.reshape(ours)


def to_hqq(
    W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """W_q, scale and zero of ours as hqq has them: `from_hqq`, the other way.

    W_q [units, row_bytes] is uint8 or the same bits viewed as a float; scale and zero are
    [units, groups]. The result is uint8, for 3 bits int32: hqq's `view_as_float` is a view of it.

    Raises ValueError for other shapes and dtypes, and for rows that hqq cannot pack.
    """
    rows, columns, meta = _shapes(layout)
    dtype, fields = NUMBERS[layout.nbits]
    if W_q.is_floating_point():
        W_q = W_q.view(torch.uint8)
    _expect("W_q", W_q, (layout.units, layout.row_bytes), torch.uint8)
    _expect("scale", scale, (layout.units, layout.groups))
    _expect("zero", zero, (layout.units, layout.groups))
    packed = W_q.new_zeros(math.ceil(rows / fields), columns, dtype=dtype)
    for units in _parts(layout):
        codes = unpack(W_q[units], layout.nbits, layout.row_codes)
        _write(packed, _to_matrix(codes, layout), layout, *_place(layout, units))
    return packed, scale.reshape(meta), zero.reshape(meta)


def _shapes(layout: Layout) -> tuple[int, int, tuple[int, int]]:
    """Rows and columns of hqq's matrix of codes, and the shape of its scale and zero."""
    groups, g = layout.units * layout.groups, layout.group_size
    rows, columns = (groups, g) if layout.axis == 1 else (g, groups)
    fields = NUMBERS[layout.nbits][1]
    if layout.nbits != 3 and rows % fields:
        raise ValueError(
            f"{layout}: hqq packs {layout.nbits}-bit codes {fields} rows to one, and cannot pack "
            f"{rows} rows"
        )
    return rows, columns, ((groups, 1) if layout.axis == 1 else (1, groups))


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None
) -> None:
    if tensor.shape != shape or tensor.dtype != (dtype or tensor.dtype):
        raise ValueError(
            f"{name} is {list(tensor.shape)} {tensor.dtype}: expected {list(shape)}"
            + (f" {dtype}, or a float view of it" if dtype else "")
        )


def _parts(layout: Layout) -> Iterator[slice]:
    """All units, as many at a time as fit the memory that we take."""
    step = max(1, CHUNK_CODES // layout.row_codes)
    return (slice(i, min(i + step, layout.units)) for i in range(0, layout.units, step))


def _place(layout: Layout, units: slice) -> tuple[slice, slice]:
    """Rows and columns of these units in hqq's matrix."""
    whole = slice(0, layout.group_size)
    groups = slice(units.start * layout.groups, units.stop * layout.groups)
    return (groups, whole) if layout.axis == 1 else (whole, groups)


def _to_units(codes: Tensor, layout: Layout) -> Tensor:
    """A part of hqq's matrix as [units, row_codes]."""
    if layout.axis == 0:
        codes = codes.t().contiguous()  # groups, then the codes of a group
    return codes.view(-1, layout.row_codes)


def _to_matrix(codes: Tensor, layout: Layout) -> Tensor:
    """Codes [units, row_codes] as a part of hqq's matrix."""
    codes = codes.view(-1, layout.group_size)
    return codes if layout.axis == 1 else codes.t()


def _read(W_q: Tensor, layout: Layout, rows: slice, columns: slice) -> Tensor:
    codes = W_q.new_empty(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.uint8)
    for shift, packed, unpacked in _fields(len(W_q), layout.nbits, rows):
        codes[unpacked] = (W_q[packed, columns] >> shift) & ((1 << layout.nbits) - 1)
    return codes


def _write(W_q: Tensor, codes: Tensor, layout: Layout, rows: slice, columns: slice) -> None:
    for shift, packed, unpacked in _fields(len(W_q), layout.nbits, rows):
        W_q[packed, columns] |= codes[unpacked].to(W_q.dtype) << shift


def _fields(step: int, nbits: int, rows: slice) -> Iterator[tuple[int, slice, slice]]:
    """Where rows of codes lie: their shift, the rows of packed numbers, and which they are."""
    fields = NUMBERS[nbits][1]
    for field in range(rows.start // step, (rows.stop - 1) // step + 1):
        first = field * step
        start, stop = max(rows.start, first), min(rows.stop, first + step)
        yield (
            nbits * (fields - 1 - field),
            slice(start - first, stop - first),
            slice(start - rows.start, stop - rows.start),
        )
