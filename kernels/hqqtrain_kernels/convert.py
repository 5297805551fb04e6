"""Convert hqq's packed weights to our layout and back, bit for bit, to exchange checkpoints.

hqq 0.2.8 groups a weight to a matrix [groups, group_size] (axis 1) or [group_size, groups]
(axis 0), and packs distant rows of it together. With k codes in an integer, integer [r, c] holds
the codes [r, c], [r + step, c], [r + 2 step, c] ... with step = ceil(rows / k), the first in its
highest bits (hqq/core/bitpack.py). Its groups are those of our layout, in another order.

The conversion is plain PyTorch. It runs on the device of the tensors, and in chunks of whole units,
so that it needs little memory in addition to the result. It is far slower than a copy: a weight of
28672 x 8192 takes 2 to 18 ms on an H200, and a copy of the packed bytes 0.01 to 0.1 ms. Scaled to a
Llama-70B, this is 5 s, once.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hqqtrain_kernels.layout import Layout
from hqqtrain_kernels.reference import CHUNK_CODES, pack, unpack

HQQ_PACKINGS = {
    8: (torch.uint8, 1),  # 8bit_u8
    4: (torch.uint8, 2),  # 4bit_u8
    3: (torch.int32, 10),  # 3bit_32
    2: (torch.uint8, 4),  # 2bit_u8
    1: (torch.uint8, 8),  # 1bit_u8
}
"""By nbits: the dtype that hqq packs into, and the codes that one integer holds."""


def from_hqq(
    W_q: Tensor, meta_scale: Tensor, meta_zero: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert W_q, scale and zero of an hqq layer to our layout.

    Args:
        W_q: As hqq packs it, [ceil(groups / k), group_size] for axis 1 and [ceil(group_size / k),
            groups] for axis 0, with the groups of the whole weight. Its dtype is uint8, or int32
            for 3 bits (k = 10), or a float view of either.
        meta_scale: [groups, 1] for axis 1, [1, groups] for axis 0. Its dtype is kept.
        meta_zero: Like meta_scale.
        layout: Our layout of the weight.

    Returns:
        W_q uint8 [units, unit_bytes], scale [units, groups] and zero [units, groups].

    Raises:
        ValueError: A shape or dtype differs, or hqq cannot pack this number of rows.
    """
    packed_shape, meta_shape = hqq_shapes(layout)
    dtype = HQQ_PACKINGS[layout.nbits][0]
    if W_q.dtype != dtype and W_q.is_floating_point():
        W_q = W_q.view(dtype)
    _check("W_q", W_q, packed_shape, dtype)
    _check("scale", meta_scale, meta_shape)
    _check("zero", meta_zero, meta_shape)
    packed = W_q.new_empty(layout.units, layout.unit_bytes, dtype=torch.uint8)
    for units in _unit_chunks(layout):
        codes = read_hqq_codes(lambda rows, columns: W_q[rows, columns], layout, units)
        packed[units] = pack(codes, layout.nbits)
    our_shape = (layout.units, layout.groups)
    return packed, meta_scale.reshape(our_shape), meta_zero.reshape(our_shape)


def read_hqq_codes(read: Callable[[slice, slice], Tensor], layout: Layout, units: slice) -> Tensor:
    """Read the codes of some units from a weight that hqq has packed, which may be on disk.

    Args:
        read: Returns the given rows and columns of hqq's W_q, in the shape of `hqq_shapes`.
        layout: Our layout of the whole weight.
        units: The units, with a start and a stop.

    Returns:
        Codes, uint8 [units, unit_codes].
    """
    rows, columns = _region(layout, units)
    (step, _), _ = hqq_shapes(layout)
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    codes: Tensor | None = None
    for shift, packed, unpacked in _field_slices(step, layout.nbits, rows):
        integers = read(packed, columns)
        if codes is None:
            codes = integers.new_empty(shape, dtype=torch.uint8)
        codes[unpacked] = (integers >> shift) & ((1 << layout.nbits) - 1)
    assert codes is not None, units
    return _to_units(codes, layout)


def hqq_shapes(layout: Layout) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of hqq's W_q, and of its scale and zero.

    Raises:
        ValueError: hqq cannot pack this number of rows.
    """
    rows, columns, meta_shape = _matrix_shapes(layout)
    return (math.ceil(rows / HQQ_PACKINGS[layout.nbits][1]), columns), meta_shape


def to_hqq(
    W_q: Tensor, scale: Tensor, zero: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert W_q, scale and zero from our layout to hqq's: the inverse of `from_hqq`.

    Args:
        W_q: [units, unit_bytes], uint8 or the same bits viewed as a float dtype.
        scale: [units, groups].
        zero: [units, groups].
        layout: Our layout of the weight.

    Returns:
        W_q, scale and zero in the shapes that `from_hqq` describes. W_q is uint8, or int32 for 3
        bits; hqq's `view_as_float` is a view of it.

    Raises:
        ValueError: A shape or dtype differs, or hqq cannot pack this number of rows.
    """
    packed_shape, meta_shape = hqq_shapes(layout)
    dtype = HQQ_PACKINGS[layout.nbits][0]
    if W_q.is_floating_point():
        W_q = W_q.view(torch.uint8)
    _check("W_q", W_q, (layout.units, layout.unit_bytes), torch.uint8)
    _check("scale", scale, (layout.units, layout.groups))
    _check("zero", zero, (layout.units, layout.groups))
    packed = W_q.new_zeros(packed_shape, dtype=dtype)
    for units in _unit_chunks(layout):
        codes = unpack(W_q[units], layout.nbits, layout.unit_codes)
        _write_codes(packed, _to_hqq_matrix(codes, layout), layout, *_region(layout, units))
    return packed, scale.reshape(meta_shape), zero.reshape(meta_shape)


def _matrix_shapes(layout: Layout) -> tuple[int, int, tuple[int, int]]:
    """Return rows and columns of hqq's matrix of codes, and the shape of its scale and zero."""
    groups, g = layout.units * layout.groups, layout.group_size
    rows, columns = (groups, g) if layout.axis == 1 else (g, groups)
    fields = HQQ_PACKINGS[layout.nbits][1]
    if layout.nbits != 3 and rows % fields:
        raise ValueError(
            f"{layout}: hqq packs {fields} rows of {layout.nbits}-bit codes into one, and cannot "
            f"pack {rows} rows"
        )
    return rows, columns, ((groups, 1) if layout.axis == 1 else (1, groups))


def _check(
    name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None
) -> None:
    if tensor.shape != shape or tensor.dtype != (dtype or tensor.dtype):
        raise ValueError(
            f"{name} is {list(tensor.shape)} {tensor.dtype}: expected {list(shape)}"
            + (f" {dtype}, or a float view of it" if dtype else "")
        )


def _unit_chunks(layout: Layout) -> Iterator[slice]:
    """Yield all units, in chunks of at most CHUNK_CODES codes."""
    units_per_chunk = max(1, CHUNK_CODES // layout.unit_codes)
    for start in range(0, layout.units, units_per_chunk):
        yield slice(start, min(start + units_per_chunk, layout.units))


def _region(layout: Layout, units: slice) -> tuple[slice, slice]:
    """Return the rows and columns of these units in hqq's matrix."""
    groups = slice(units.start * layout.groups, units.stop * layout.groups)
    group_codes = slice(0, layout.group_size)
    return (groups, group_codes) if layout.axis == 1 else (group_codes, groups)


def _to_units(codes: Tensor, layout: Layout) -> Tensor:
    """Rearrange a region of hqq's matrix to [units, unit_codes]."""
    if layout.axis == 0:
        codes = codes.t().contiguous()  # to [groups, codes of a group]
    return codes.view(-1, layout.unit_codes)


def _to_hqq_matrix(codes: Tensor, layout: Layout) -> Tensor:
    """Rearrange codes [units, unit_codes] to a region of hqq's matrix."""
    codes = codes.view(-1, layout.group_size)
    return codes if layout.axis == 1 else codes.t()


def _write_codes(W_q: Tensor, codes: Tensor, layout: Layout, rows: slice, columns: slice) -> None:
    for shift, packed, unpacked in _field_slices(len(W_q), layout.nbits, rows):
        W_q[packed, columns] |= codes[unpacked].to(W_q.dtype) << shift


def _field_slices(step: int, nbits: int, rows: slice) -> Iterator[tuple[int, slice, slice]]:
    """Yield where hqq stores `rows` of codes, bit field by bit field.

    Each item is the shift of the field, the rows of packed integers, and the positions within
    `rows` of the codes they hold. `step` is the number of rows of packed integers.
    """
    fields = HQQ_PACKINGS[nbits][1]
    # Field f holds the rows f * step to (f + 1) * step: visit the fields that `rows` reaches into.
    for field in range(rows.start // step, (rows.stop - 1) // step + 1):
        field_start = field * step
        start, stop = max(rows.start, field_start), min(rows.stop, field_start + step)
        yield (
            nbits * (fields - 1 - field),
            slice(start - field_start, stop - field_start),
            slice(start - rows.start, stop - rows.start),
        )
